"""config.json of Qwen3-MoE: Qwen3-30B-A3B, -235B-A22B, -Coder and their FP8 forms (arXiv 2505.09388).

A layer is a mixture where `decoder_sparse_step` divides its number, counted from 1, unless `mlp_only_layers` names it;
the others are dense and have the width `intermediate_size`. `sliding_window` counts only with `use_sliding_window`; it
then holds for all layers in transformers 5, from layer `max_window_layers` on in earlier releases, and nowhere in vLLM.
So a file with both is refused where they contradict each other, and only a model with full attention in all layers and
one expert count is written as plain `qwen3_moe`. Left out: other activations, and attention in two chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from puzzle_jax.config import QWEN3_MOE, ModelConfig, RopeConfig
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
from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json

_FIXED = {"hidden_act": "silu", "dual_chunk_attention_config": None}
_SIZES = {**SIZES, "intermediate_size": "moe_intermediate_size"}
_WINDOW, _DENSE_SIZE, _MAX_POSITION, _THETA = 4_096, 6_144, 32_768, 10_000.0  # in transformers, where they are missing


def _parse(fields: Fields, puzzle: bool) -> ModelConfig:
    fields.require(_FIXED)
    layers = fields.integer("num_hidden_layers", most=MAX_LAYERS)
    sizes = {name: fields.integer(written) for name, written in _SIZES.items() if name != "head_dim"}
    sizes["head_dim"] = fields.integer("head_dim", max(1, sizes["hidden_size"] // sizes["num_heads"]))
    dense = _dense_layers(fields, layers)
    kind = _kind(fields, puzzle)
    types = layer_types(fields, [kind] * layers)
    _, experts = fields.either("num_experts", "num_local_experts", MAX_EXPERTS)
    if puzzle:
        blocks = listed_blocks(fields, types, least=0)
    else:
        if set(types) != {kind}:
            raise fields.fail("layer_types", f"without block_configs every layer is {kind}, by use_sliding_window")
        counts = [0 if layer in dense else experts for layer in range(layers)]
        blocks = plain_blocks(fields, counts, types, _WINDOW)
    for layer, block in enumerate(blocks):
        if (block.num_experts == 0) != (layer in dense):
            raise CheckpointError(
                f"{fields.source}: layer {layer} has {block.num_experts} experts, but mlp_only_layers and "
                f"decoder_sparse_step make it {'dense' if layer in dense else 'a mixture of experts'}"
            )
    longest = fields.integer("max_position_embeddings", _MAX_POSITION)
    plain = RopeConfig(theta=_THETA, factor=1.0, original_context=longest, truncate=True)
    rope = parse_rope(fields, Defaults(absent=plain, plain=plain, max_position=longest))
    return ModelConfig(
        **sizes,
        experts_per_token=fields.integer("num_experts_per_tok", 8),
        blocks=blocks,
        rope=replace(plain, theta=rope.theta) if rope.factor == 1.0 else rope,
        max_position=longest,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        swiglu_limit=None,
        variant=replace(
            QWEN3_MOE,
            attention_bias=fields.boolean("attention_bias", False),
            normalized_gates=fields.boolean("norm_topk_prob", False),
            tied_head=fields.boolean("tie_word_embeddings", False),
        ),
        dense_size=fields.integer("intermediate_size", _DENSE_SIZE) if dense else None,
    )


def _dense_layers(fields: Fields, layers: int) -> set[int]:
    named = [] if fields.data.get("mlp_only_layers") is None else fields.data["mlp_only_layers"]
    whole = isinstance(named, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in named)
    if not whole or not all(0 <= each < layers for each in named):
        raise fields.fail("mlp_only_layers", f"must be a list of layers, which are 0 to {layers - 1}")
    step = fields.integer("decoder_sparse_step", 1)
    dense = {layer for layer in range(layers) if layer in set(named) or (layer + 1) % step}
    if len(dense) == layers:
        raise CheckpointError(
            f"{fields.source}: mlp_only_layers is {shown(named)} and decoder_sparse_step {step}, which make all "
            f"{layers} layers dense, but at least one must be a mixture of experts"
        )
    return dense


def _kind(fields: Fields, puzzle: bool) -> str:
    """The type of all layers where nothing else says it, by `use_sliding_window`."""
    if not fields.boolean("use_sliding_window", False) or fields.data.get("sliding_window", _WINDOW) is None:
        return FULL
    if fields.data.get("max_window_layers", 0) != 0 and not puzzle:
        raise fields.fail(
            "max_window_layers",
            "use_sliding_window is true, and releases of transformers differ in whether both count; only 0 is "
            "supported then",
        )
    return SLIDING


def _is_plain(config: ModelConfig) -> bool:
    counts = {block.num_experts for block in config.blocks if block.num_experts}
    return len(counts) == 1 and all(block.window is None for block in config.blocks)


def _written(config: ModelConfig, base: Mapping[str, Json], plain: bool) -> dict[str, Json]:
    out = written_layers(config, listed=not plain)
    if plain:
        del out["layer_types"]  # the published models have none
    out |= {
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.dense_size or base.get("intermediate_size", _DENSE_SIZE),
        "num_experts": out["num_local_experts"],
        "mlp_only_layers": [layer for layer, block in enumerate(config.blocks) if not block.num_experts],
        "decoder_sparse_step": 1,
        "norm_topk_prob": config.variant.normalized_gates,
        "use_sliding_window": out["sliding_window"] is not None,
    }
    if config.rope.factor != 1.0:
        out["rope_scaling"] = written_rope(config.rope)
    return out


FAMILY = Family(
    name="Qwen3-MoE",
    plain="qwen3_moe",
    stem="Qwen3Moe",
    quantization="fp8",
    plain_windows="full attention in all layers",
    runtimes="transformers, vLLM, SGLang, llama.cpp (after conversion), mlx-lm",
    parse=_parse,
    written=_written,
    is_plain=_is_plain,
    replaced=("rope_scaling", "max_window_layers", "layer_types"),
)
