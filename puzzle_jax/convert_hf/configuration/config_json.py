"""Reading and writing config.json.

Each family (`FAMILIES`) has two model types: a plain one, which runtimes know, and that of a heterogeneous child, such
as `gpt_oss_puzzle`, where `block_configs` gives the experts and the window of every layer. Rotary settings are read in
the old form (`rope_theta`, `rope_scaling`) and in that of transformers 5 (`rope_parameters`), and written in the old
form, which every runtime loads.

A missing field has the value that transformers gives it (the family's configuration class of 5.x), so that a parent and
its exported child are the same function there. Where the file contradicts itself, so that runtimes disagree about which
value counts, it is refused by name.

A model is written as its family's plain model type only where all runtimes read it correctly (`is_plain`). Left out:
values that change the arithmetic in ways the network does not have (other activations and rotary types, rotary settings
by type of layer or for a part of a head); they are refused rather than ignored.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration import gpt_oss, quantization, qwen3_moe
from puzzle_jax.convert_hf.configuration.family import SIZES, Family
from puzzle_jax.convert_hf.configuration.fields import Fields
from puzzle_jax.convert_hf.configuration.rope_json import ORIGINAL
from puzzle_jax.convert_hf.other_forms import INDEX, SINGLE, original_form
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.files import Json

FAMILIES: dict[str, Family] = {family.plain: family for family in (gpt_oss.FAMILY, qwen3_moe.FAMILY)}
"""Families by `Variant.family`, the name of their plain model type."""

_BY_TYPE = {name: family for family in FAMILIES.values() for name in (family.plain, family.puzzle)}
_REPLACED = (
    *("rope_parameters", ORIGINAL, "partial_rotary_factor"),
    *("per_layer_config", "block_configs", "auto_map", "model_file"),
)


def family_of(config: ModelConfig) -> Family:
    """The family of a model."""
    return FAMILIES[config.variant.family]


def parse_config(data: dict[str, Json], source: Path) -> ModelConfig:
    """The model that a config.json describes.

    Args:
      data: the file's content.
      source: the file, for messages.

    Raises `CheckpointError` for an unknown model type, and for fields that are missing, of the wrong kind,
    contradictory, or ask for arithmetic that the network does not have.
    """
    fields = Fields(data, source)
    if "model_type" not in data and {"num_experts", "rope_scaling_factor"} <= set(data):
        raise CheckpointError(original_form(source))
    family = _family(fields)
    if data.get("transformers_weights") is not None:
        raise fields.fail("transformers_weights", f"only {SINGLE} or {INDEX} is read")
    try:
        return family.parse(fields, data["model_type"] == family.puzzle)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None


def _family(fields: Fields) -> Family:
    family = _BY_TYPE.get(fields.string("model_type"))
    if family is None:
        known = list(_BY_TYPE)
        raise fields.fail("model_type", f"only {', '.join(known[:-1])} and {known[-1]} are known")
    return family


def parse_form(data: dict[str, Json], source: Path) -> Form:
    """How matrices are stored according to `quantization_config`.

    Raises `CheckpointError` for methods other than that of the family, which `model_type` names.
    """
    return quantization.parse_form(data, source, _family(Fields(data, source)).quantization)


def is_plain(config: ModelConfig) -> bool:
    """Tells whether every runtime builds the model from its family's plain model type."""
    return family_of(config).is_plain(config)


def write_config(
    config: ModelConfig, base: dict[str, Json], *, form: Form | None = None, unquantized: Iterable[str] = ()
) -> dict[str, Json]:
    """The content of config.json for `config`.

    Args:
      config: the model.
      base: the parent's config.json (or {}); keys that are not about `config`, such as token ids, are kept.
      form: how matrices are stored; None keeps the base's `quantization_config`.
      unquantized: modules that are stored in BF16, beside those that the base names.
    """
    family, plain = family_of(config), is_plain(config)
    dropped = {*_REPLACED, *family.replaced}
    out: dict[str, Json] = {name: value for name, value in base.items() if name not in dropped}
    out.update(
        architectures=[f"{family.stem}ForCausalLM" if plain else f"{family.stem}PuzzleForCausalLM"],
        model_type=family.plain if plain else family.puzzle,
        **{written: getattr(config, name) for name, written in SIZES.items()},
        num_hidden_layers=config.num_layers,
        num_experts_per_tok=config.experts_per_token,
        max_position_embeddings=config.max_position,
        rope_theta=config.rope.theta,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act="silu",
        attention_bias=config.variant.attention_bias,
        tie_word_embeddings=config.variant.tied_head,
    )
    out.update(family.written(config, base, plain))
    if "dtype" not in out:
        out.setdefault("torch_dtype", "bfloat16")
    if not plain:
        out["auto_map"] = family.auto_map
        out["model_file"] = family.model_file
    quantized = quantization.written_quantization(
        out.pop("quantization_config", None), form, plain=plain, skipped=unquantized
    )
    return out if quantized is None else {**out, "quantization_config": quantized}
