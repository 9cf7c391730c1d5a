"""config.json of gpt-oss: openai/gpt-oss-20b and -120b, and nvidia/gpt-oss-puzzle-88B.

In plain `gpt_oss`, `layer_types` and one `sliding_window` give every layer's attention. A model is written as such only
with one expert count, and one window width on even layers with full attention on odd ones, because several runtimes
take that alternation for granted. Left out: tied embeddings and attention without biases.
"""

from __future__ import annotations

from collections.abc import Mapping

from puzzle_jax.config import GPT_OSS, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.configuration.family import SIZES, Family
from puzzle_jax.convert_hf.configuration.fields import MAX_EXPERTS, MAX_LAYERS, Fields
from puzzle_jax.convert_hf.configuration.layers import (
    FULL,
    SLIDING,
    layer_types,
    listed_blocks,
    plain_blocks,
    written_layers,
)
from puzzle_jax.convert_hf.configuration.rope_json import Defaults, parse_rope, written_rope
from puzzle_jax.errors import CheckpointError
from puzzle_jax.files import Json

_FIXED = {"tie_word_embeddings": False, "attention_bias": True, "swiglu_alpha": 1.702}
_EXPERTS_PER_TOKEN = 4  # in transformers, where num_experts_per_tok is missing
_ROPE = Defaults(absent=RopeConfig(), plain=RopeConfig(factor=1.0), max_position=131_072)


def _parse(fields: Fields, puzzle: bool) -> ModelConfig:
    fields.require(_FIXED)
    layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    sizes = {name: fields.integer(written) for name, written in SIZES.items()}
    per_token = _experts_per_token(fields)
    types = layer_types(fields, [FULL if layer % 2 else SLIDING for layer in range(layers)])
    if puzzle:
        blocks = listed_blocks(fields, types)
    else:
        _, experts = fields.either("num_local_experts", "num_experts", MAX_EXPERTS)  # transformers reads both
        blocks = plain_blocks(fields, [experts] * layers, types)
    return ModelConfig(
        **sizes,
        experts_per_token=per_token,
        blocks=blocks,
        rope=parse_rope(fields, _ROPE),
        max_position=fields.integer("max_position_embeddings", _ROPE.max_position),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
        swiglu_limit=fields.number("swiglu_limit", 7.0),
        variant=GPT_OSS,
    )


def _experts_per_token(fields: Fields) -> int:
    """Experts per token: `num_experts_per_tok`, which the published models repeat under another name."""
    names, value = fields.either("num_experts_per_tok", "experts_per_token")
    if names == ["experts_per_token"] and value != _EXPERTS_PER_TOKEN:
        raise CheckpointError(
            f"{fields.source}: num_experts_per_tok is missing, for which transformers takes {_EXPERTS_PER_TOKEN}, but "
            f"experts_per_token is {value}; write num_experts_per_tok"
        )
    return value


def _is_plain(config: ModelConfig) -> bool:
    counts = {block.num_experts for block in config.blocks}
    even = {block.window for block in config.blocks[0::2]}
    odd = {block.window for block in config.blocks[1::2]}
    return len(counts) == 1 and len(even) == 1 and None not in even and odd <= {None}


def _written(config: ModelConfig, base: Mapping[str, Json], plain: bool) -> dict[str, Json]:
    return {
        **written_layers(config, listed=not plain),
        "intermediate_size": config.intermediate_size,
        "experts_per_token": config.experts_per_token,
        "initial_context_length": config.rope.original_context,
        "rope_scaling": written_rope(config.rope),
        "swiglu_limit": config.swiglu_limit,
    }


FAMILY = Family(
    name="gpt-oss",
    plain="gpt_oss",
    stem="GptOss",
    quantization="mxfp4",
    plain_windows="one width on even layers and none on odd ones",
    runtimes="transformers, vLLM, llama.cpp (after conversion), mlx-lm",
    parse=_parse,
    written=_written,
    is_plain=_is_plain,
    replaced=("num_experts",),
)
