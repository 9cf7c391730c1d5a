"""`quantization_config` of a config.json: how matrices are stored, and which of them are not quantised.

MXFP4 packs the experts of gpt-oss. FP8 is the block form of DeepSeek-V3 and Qwen3: e4m3 with one scale for each block
of 128 x 128 values, in all matrices of attention, experts and dense layers but those of `modules_to_not_convert`. Left
out: scales of activations (`activation_scheme` static), and other block sizes and scale types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.convert_hf.configuration.fields import Fields
from puzzle_jax.convert_hf.table import BLOCK, Form
from puzzle_jax.errors import CheckpointError
from puzzle_jax.files import Json

MXFP4_EXPERTS = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
_FP8_FIXED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "scale_fmt": "float",
    "expert_dtype": "fp8",
    "modules_to_convert": None,
}
_SKIPPED = ("modules_to_not_convert", "ignored_layers")
"""The two names of one list; runtimes differ in which they prefer where both are given."""


def parse_form(data: dict[str, Json], source: Path, known: str) -> Form:
    """How matrices are stored.

    Args:
      known: the one quant_method that the family is read in.

    Raises `CheckpointError` for another one, and for forms of it that are not read.
    """
    quantization = Fields(data, source).table("quantization_config")
    if quantization is None:
        return "bf16"
    if quantization.string("quant_method") != known:
        raise quantization.fail("quant_method", f"only {known} (or no quantization_config) is supported")
    if known == "mxfp4":
        return "mxfp4"
    quantization.require(_FP8_FIXED)
    if quantization.data.get("weight_block_size") != [BLOCK, BLOCK]:
        raise quantization.fail("weight_block_size", f"only [{BLOCK}, {BLOCK}] is supported")
    both = [quantization.strings(name) for name in _SKIPPED if quantization.data.get(name) is not None]
    if len(both) > 1 and set(both[0]) != set(both[1]):
        raise CheckpointError(
            f"{source}: quantization_config.{_SKIPPED[0]} and .{_SKIPPED[1]} differ, but mean the same; remove one"
        )
    return "fp8"


@dataclass(frozen=True)
class Modules:
    """Modules that a list names, by their beginning up to a dot or by their end, as transformers understands it.

    Left out: regular expressions, which it would take as well.
    """

    names: frozenset[str] = frozenset()

    def __contains__(self, module: str) -> bool:
        dots = (index for index, character in enumerate(module) if character == ".")
        begins = any(module[:stop] in self.names for stop in (*dots, len(module)))
        return begins or any(module[start:] in self.names for start in range(1, len(module)))

    def __or__(self, names: Iterable[str]) -> Modules:
        return Modules(self.names.union(names))


def unquantized(data: Mapping[str, Json], source: Path) -> Modules:
    """The modules that a quantised checkpoint stores in BF16 all the same."""
    quantization = Fields(dict(data), source).table("quantization_config") or Fields({}, source)
    return Modules() | (name for key in _SKIPPED for name in quantization.strings(key))


def written_quantization(
    base: Json, form: Form | None, *, plain: bool, skipped: Iterable[str] = ()
) -> dict[str, Json] | None:
    """`quantization_config` of a checkpoint; None where it has none.

    Args:
      base: that of the checkpoint that this one is made from.
      form: how matrices are stored; None keeps the base's.
      plain: whether it has its family's plain model type.
      skipped: modules that are not quantised, beside those of the base.
    """
    if form == "bf16":
        return None
    if not base:
        base = MXFP4_EXPERTS if form == "mxfp4" else None
    if not base:
        return None
    out = {key: value for key, value in base.items() if key != "dequantize"}
    lists = [key for key in _SKIPPED if base.get(key) is not None] or _SKIPPED[:1]
    known = Modules() | (base.get(lists[0]) or ())
    if added := [name for name in skipped if name not in known]:
        out |= {key: [*(base.get(key) or ()), *added] for key in lists}
    if not plain:
        # transformers' quantised experts are built with one count for all layers; unpacking has no such limit.
        out["dequantize"] = True
    return out
