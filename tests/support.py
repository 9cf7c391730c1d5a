"""Random models for tests: every dimension distinct, every bias and sink random, values large enough to clamp."""

from __future__ import annotations

import jax

from puzzle_jax.config import BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.model.spec import Params, init_params, is_spec, param_specs

BLOCKS = (BlockConfig(7, 5), BlockConfig(7, None), BlockConfig(7, 5), BlockConfig(7, None))


def small_config(blocks: tuple[BlockConfig, ...] = BLOCKS, **changes: object) -> ModelConfig:
    """97 tokens, hidden 40, intermediate 24, 6 heads on 3 of 10 dimensions, 2 of 7 experts, windows of 5."""
    settings = dict(
        vocab_size=97,
        hidden_size=40,
        intermediate_size=24,
        num_heads=6,
        num_kv_heads=3,
        head_dim=10,
        experts_per_token=2,
        rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=32),
        max_position=512,
        swiglu_limit=1.5,
    )
    return ModelConfig(blocks=blocks, **{**settings, **changes})  # type: ignore[arg-type]


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Fresh parameters in which norms, biases and sinks are random too, not ones and zeros."""
    specs, tree = jax.tree.flatten(param_specs(config), is_leaf=is_spec)
    values = jax.tree.leaves(init_params(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(values))
    noisy = [
        value if spec.init == "normal" else value + 0.5 * jax.random.normal(key, value.shape)
        for spec, value, key in zip(specs, values, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def random_tokens(config: ModelConfig, batch: int, seq: int, seed: int = 2) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, seq), 0, config.vocab_size)


def chat_config() -> ModelConfig:
    """Two layers over the embedded parent's 128 tokens, with experts that MXFP4 groups divide: for whole runs."""
    return ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_heads=6,
        num_kv_heads=3,
        head_dim=10,
        experts_per_token=2,
        blocks=(BlockConfig(8, 16), BlockConfig(8, None)),
        rope=RopeConfig(theta=10_000.0, factor=4.0, original_context=256),
        max_position=768,
    )
