"""Scales of an FP8 KV cache, from the largest keys (after rotation) and values on real traces.

    scale = amax / 448, per layer, over every token of the traces

Traces must be the model's own answers: prompts alone do not show the largest values of reasoning.
Left out: percentiles and moving averages; a cache that saturates nothing needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.kernels.float8 import E4M3_MAX
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.child import View
from puzzle_jax.model.network import attention_block, embed, moe_block, traced_mesh
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.schedule import jit_layers
from puzzle_jax.model.spec import Params


def calibrate_cache(
    params: Params,
    config: ModelConfig,
    batches: Iterable[MicroBatch],
    *,
    view: View | None = None,
    on_batch: Callable[[], None] | None = None,
) -> KVScales:
    """Scales at which no key or value of the batches saturates; padding is ignored.

    `params` are in the dtype to compute with; `on_batch` is called after each batch. Raises PuzzleError if there are no
    batches, or if a layer's keys or values are all zero or not finite.
    """
    largest = None
    for batch in batches:
        here = np.asarray(largest_by_layer(params, config, batch.tokens, batch.valid, view))
        largest = here if largest is None else np.maximum(largest, here)
        if on_batch is not None:
            on_batch()
    if largest is None:
        raise PuzzleError("there are no traces to calibrate the cache on")
    for layer, pair in enumerate(largest):
        for name, value in zip("kv", pair, strict=True):
            if not 0 < value < np.inf:
                raise PuzzleError(f"layer {layer}: the largest {name} on the traces is {value}, which gives no scale")
    scales = jnp.asarray(largest / E4M3_MAX, jnp.float32)
    return KVScales(scales[:, 0], scales[:, 1])


@jit_layers(static_argnames="config")
def largest_by_layer(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "rows seq"],
    valid: Bool[Array, "rows seq"],
    view: View | None,
) -> Float[Array, "layers 2"]:
    """The largest magnitudes of keys and values in each layer."""
    table = rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    x = embed(params, tokens)
    found = []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        window = block.window if view is None else view.windows[index]
        x, qkv = attention_block(layer["attention"], config, x, table, window=window)
        seen = valid[:, :, None, None]
        found.append(jnp.stack([jnp.max(jnp.abs(y.astype(jnp.float32)) * seen) for y in (qkv.k, qkv.v)]))
        x, _ = moe_block(layer["moe"], config, x, expert_mask=None if view is None else view.expert_masks[index])
    # Replicated, so that every process can read it.
    largest = jnp.stack(found)
    return largest if traced_mesh() is None else jax.lax.with_sharding_constraint(largest, PartitionSpec())
