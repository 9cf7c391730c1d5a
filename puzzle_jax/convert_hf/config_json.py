"""config.json of gpt-oss checkpoints, in and out.

Two model types are read: `gpt_oss`, where `layer_types` and one `sliding_window` say every layer's attention
and all layers have the same experts, and `gpt_oss_puzzle`, where `block_configs` says both per layer (the
published form of nvidia/gpt-oss-puzzle-88B). Rotary settings are read in the old form (`rope_theta`,
`rope_scaling`) and in that of transformers 5 (`rope_parameters`), and written in the old one, which every
runtime loads.

A model is written as plain `gpt_oss` only where all runtimes read it rightly: one expert count, and one
window width on even layers with full attention on odd ones, because several runtimes take that alternation
for granted. Everything else becomes `gpt_oss_puzzle`. Left out: values that change the arithmetic in ways the
network does not have (tied embeddings, attention without biases, other rotary types); they are refused rather
than ignored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.errors import CheckpointError, ConfigError, shown

PLAIN, PUZZLE = "gpt_oss", "gpt_oss_puzzle"
SLIDING, FULL = "sliding_attention", "full_attention"
SWIGLU_ALPHA = 1.702
AUTO_MAP = {
    "AutoConfig": "configuration_gpt_oss_puzzle.GptOssPuzzleConfig",
    "AutoModel": "modeling_gpt_oss_puzzle.GptOssPuzzleModel",
    "AutoModelForCausalLM": "modeling_gpt_oss_puzzle.GptOssPuzzleForCausalLM",
}
MODEL_FILE = "mlx_gpt_oss_puzzle.py"
"""What mlx-lm runs where it would otherwise look for a model type of its own."""
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}

_FIXED = {"tie_word_embeddings": False, "attention_bias": True, "swiglu_alpha": SWIGLU_ALPHA}
_REPLACED = ("rope_parameters", "per_layer_config", "block_configs", "auto_map", "model_file")


MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 10_000, 65_536, 2**31 - 1
"""What a config.json may ask for; a number above is taken for damage rather than tried."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class _Fields:
    """A JSON object whose values are checked as they are taken; errors name file, field, value and rule."""

    def __init__(self, data: dict[str, Any], source: Path, prefix: str = "") -> None:
        self.data, self.source, self.prefix = data, source, prefix

    def fail(self, name: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.prefix}{name} is {shown(self.data.get(name))}, but {rule}")

    def _take(self, name: str, default: Any, accepts: Callable[[Any], bool], rule: str) -> Any:
        if self.data.get(name) is None:
            if default is not None:
                return default
            raise CheckpointError(f"{self.source}: {self.prefix}{name} is missing, but {rule}")
        if not accepts(self.data[name]):
            raise self.fail(name, rule)
        return self.data[name]

    def integer(self, name: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        def accepts(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most

        return self._take(name, default, accepts, f"must be a whole number of at least 1 and at most {most}")

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._take(name, default, _is_number, "must be a number"))

    def boolean(self, name: str, default: bool) -> bool:
        return self._take(name, default, lambda value: isinstance(value, bool), "must be true or false")

    def string(self, name: str, default: str | None = None) -> str:
        return self._take(name, default, lambda value: isinstance(value, str), "must be a string")

    def list_of(self, name: str, length: int) -> list[Any]:
        rule = f"must be a list with one entry for each of the {length} layers"
        return self._take(name, None, lambda value: isinstance(value, list) and len(value) == length, rule)

    def table(self, name: str) -> _Fields | None:
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fail(name, "must be an object")
        return None if value is None else _Fields(value, self.source, f"{self.prefix}{name}.")


def parse_config(data: dict[str, Any], source: Path) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      data: the file's content.
      source: the file, for messages.

    Raises `CheckpointError` for an unknown model type, and for fields that are missing, of the wrong kind,
    contradictory, or ask for arithmetic that the network does not have.
    """
    fields = _Fields(data, source)
    model_type = fields.string("model_type")
    if model_type not in (PLAIN, PUZZLE):
        raise fields.fail("model_type", f"only {PLAIN} and {PUZZLE} are known")
    for name, value in _FIXED.items():
        if data.get(name, value) != value:
            raise fields.fail(name, f"only {str(value).lower()} is supported")
    layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    try:
        return ModelConfig(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_heads=fields.integer("num_attention_heads"),
            num_kv_heads=fields.integer("num_key_value_heads"),
            head_dim=fields.integer("head_dim"),
            experts_per_token=_experts_per_token(fields),
            blocks=(_plain_blocks if model_type == PLAIN else _puzzle_blocks)(fields, layers),
            rope=_rope(fields),
            max_position=fields.integer("max_position_embeddings", 131_072),
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            swiglu_limit=fields.number("swiglu_limit", 7.0),
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def parse_form(data: dict[str, Any], source: Path) -> Form:
    """How the experts are stored, by `quantization_config`; raises `CheckpointError` for methods other than
    mxfp4."""
    quantization = _Fields(data, source).table("quantization_config")
    if quantization is None:
        return "bf16"
    if quantization.string("quant_method") != "mxfp4":
        raise quantization.fail("quant_method", "only mxfp4 (or no quantization_config) is supported")
    return "mxfp4"


def _plain_blocks(fields: _Fields, layers: int) -> tuple[BlockConfig, ...]:
    experts = fields.integer("num_local_experts", most=MAX_EXPERTS)
    if fields.data.get("layer_types") is None:
        types = [FULL if layer % 2 else SLIDING for layer in range(layers)]
    else:
        types = fields.list_of("layer_types", layers)
    for layer, kind in enumerate(types):
        if kind not in (SLIDING, FULL):
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(kind)}, but must be {SLIDING} or {FULL}"
            )
    window = fields.integer("sliding_window") if SLIDING in types else None
    blocks = []
    for kind, override in zip(types, _overrides(fields, layers), strict=True):
        width = override.get("sliding_window", window) if kind == SLIDING else None
        blocks.append(BlockConfig(override.get("num_local_experts", experts), width))
    return tuple(blocks)


def _puzzle_blocks(fields: _Fields, layers: int) -> tuple[BlockConfig, ...]:
    blocks = []
    types = None if fields.data.get("layer_types") is None else fields.list_of("layer_types", layers)
    for layer, entry in enumerate(fields.list_of("block_configs", layers)):
        where = f"block_configs[{layer}]"
        if not isinstance(entry, dict) or "sliding_window" not in entry:
            rule = "must be an object with num_local_experts and sliding_window"
            raise CheckpointError(f"{fields.source}: {where} is {shown(entry)}, but {rule}")
        block = _Fields(entry, fields.source, where + ".")
        window = None if entry["sliding_window"] is None else block.integer("sliding_window")
        blocks.append(BlockConfig(block.integer("num_local_experts", most=MAX_EXPERTS), window))
        expected = FULL if window is None else SLIDING
        if types is not None and types[layer] != expected:
            raise CheckpointError(
                f"{fields.source}: layer_types[{layer}] is {shown(types[layer])}, "
                f"but {where} has sliding_window {window}, which asks for {expected}"
            )
    for layer, (block, override) in enumerate(zip(blocks, _overrides(fields, layers), strict=True)):
        said = {"num_local_experts": block.num_experts, "sliding_window": block.window}
        for name, value in override.items():
            if value != said[name]:
                raise CheckpointError(
                    f"{fields.source}: per_layer_config.{layer}.{name} is {value}, "
                    f"but block_configs[{layer}] says {said[name]}; they must be equal"
                )
    return tuple(blocks)


def _overrides(fields: _Fields, layers: int) -> list[dict[str, int]]:
    """For each layer, what `per_layer_config` (transformers' own schema, sparse) says other than the whole."""
    out: list[dict[str, int]] = [{} for _ in range(layers)]
    table = fields.table("per_layer_config") or _Fields({}, fields.source)
    for key in table.data:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and int(key[:6]) < layers):
            raise CheckpointError(
                f"{fields.source}: per_layer_config has the key {shown(key)}, but there are layers 0 to {layers - 1}"
            )
        entry = table.table(key) or _Fields({}, fields.source)
        for name in entry.data:
            if name not in ("num_local_experts", "sliding_window"):
                raise entry.fail(name, "only num_local_experts and sliding_window may differ between layers")
            out[int(key)][name] = entry.integer(name, most=MAX_EXPERTS if name == "num_local_experts" else MAX_SIZE)
    return out


def _sparse(config: ModelConfig, experts: int, window: int | None) -> dict[str, dict[str, int]]:
    """`per_layer_config`: what each layer has other than the model's own expert count and window."""
    out = {}
    for layer, block in enumerate(config.blocks):
        differs = {} if block.num_experts == experts else {"num_local_experts": block.num_experts}
        if block.window not in (None, window):
            differs["sliding_window"] = block.window
        if differs:
            out[str(layer)] = differs
    return out


def _experts_per_token(fields: _Fields) -> int:
    names = [name for name in ("num_experts_per_tok", "experts_per_token") if fields.data.get(name) is not None]
    values = [fields.integer(name) for name in names or ["num_experts_per_tok"]]
    if len(set(values)) > 1:
        raise fields.fail("num_experts_per_tok", f"experts_per_token is {values[1]}; they must be equal")
    return values[0]


def _rope(fields: _Fields) -> RopeConfig:
    table = fields.table("rope_parameters")
    if table is not None and table.data.get("rope_theta") is not None:
        theta = table.number("rope_theta")
    else:
        theta = fields.number("rope_theta")
    table = table or fields.table("rope_scaling")
    if table is None:
        return RopeConfig(theta=theta, factor=1.0)
    kind_field = "rope_type" if "rope_type" in table.data else "type"
    kind = table.string(kind_field)
    if kind == "default":
        return RopeConfig(theta=theta, factor=1.0)
    if kind != "yarn":
        raise table.fail(kind_field, "only yarn and default are supported")
    original = table if table.data.get("original_max_position_embeddings") is not None else fields
    name = "original_max_position_embeddings" if original is table else "initial_context_length"
    rope = RopeConfig(
        theta=theta,
        factor=table.number("factor"),
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        original_context=original.integer(name),
        truncate=table.boolean("truncate", True),
    )
    for field in ("mscale", "mscale_all_dim"):
        if table.data.get(field) is not None:
            raise table.fail(field, "only the standard attention factor of YaRN is supported")
    if not math.isclose(table.number("attention_factor", rope.magnitude), rope.magnitude, rel_tol=1e-6):
        raise table.fail("attention_factor", f"only YaRN's own, {rope.magnitude:.6f}, is supported")
    return rope


def is_plain(config: ModelConfig) -> bool:
    """Whether plain `gpt_oss` says the model to every runtime.

    That takes one expert count, and one window width on even layers with full attention on odd ones.
    """
    counts = {block.num_experts for block in config.blocks}
    even = {block.window for block in config.blocks[0::2]}
    odd = {block.window for block in config.blocks[1::2]}
    return len(counts) == 1 and len(even) == 1 and None not in even and odd <= {None}


def write_config(config: ModelConfig, base: dict[str, Any], *, form: Form | None = None) -> dict[str, Any]:
    """The content of config.json for `config`.

    Args:
      config: the model.
      base: the parent's config.json (or {}); keys that are not about `config`, such as token ids, are kept.
      form: how the experts are stored; None keeps the base's `quantization_config`.
    """
    plain = is_plain(config)
    windows = [block.window for block in config.blocks]
    widths = [window for window in windows if window is not None]
    out: dict[str, Any] = {name: value for name, value in base.items() if name not in _REPLACED}
    out.update(
        architectures=["GptOssForCausalLM" if plain else "GptOssPuzzleForCausalLM"],
        model_type=PLAIN if plain else PUZZLE,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        # Runtimes size caches and buffers by these two, so they are the largest of any layer.
        num_local_experts=max(block.num_experts for block in config.blocks),
        sliding_window=max(widths, default=None),
        num_experts_per_tok=config.experts_per_token,
        experts_per_token=config.experts_per_token,
        layer_types=[FULL if window is None else SLIDING for window in windows],
        max_position_embeddings=config.max_position,
        initial_context_length=config.rope.original_context,
        rope_theta=config.rope.theta,
        rope_scaling={
            "rope_type": "yarn",
            "factor": config.rope.factor,
            "beta_fast": config.rope.beta_fast,
            "beta_slow": config.rope.beta_slow,
            "original_max_position_embeddings": config.rope.original_context,
            "truncate": config.rope.truncate,
        },
        rms_norm_eps=config.rms_norm_eps,
        swiglu_limit=config.swiglu_limit,
        hidden_act="silu",
        attention_bias=True,
        tie_word_embeddings=False,
    )
    if "dtype" not in out:
        out.setdefault("torch_dtype", "bfloat16")
    if not plain:
        out["block_configs"] = [
            {"num_local_experts": block.num_experts, "sliding_window": block.window} for block in config.blocks
        ]
        out["per_layer_config"] = _sparse(config, out["num_local_experts"], out["sliding_window"])
        out["auto_map"] = dict(AUTO_MAP)
        out["model_file"] = MODEL_FILE
    if form == "bf16":
        out.pop("quantization_config", None)
    elif form == "mxfp4":
        out.setdefault("quantization_config", QUANTIZATION)
    if out.get("quantization_config"):
        # transformers' packed experts are built with one count for all layers; unpacking has no such limit.
        out["quantization_config"] = {
            **{key: value for key, value in out["quantization_config"].items() if key != "dequantize"},
            **({} if plain else {"dequantize": True}),
        }
    return out
