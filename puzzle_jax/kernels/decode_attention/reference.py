"""Reference for `decode_attention`: all slots, masked by the positions that they hold."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels.window_attention.reference import softmax_with_sink


def slot_positions(positions: Int[Array, "batch"], slots: int) -> Int[Array, "batch slots"]:
    """The position that each ring slot holds once `positions` was written; negative where nothing was."""
    behind = (positions[:, None] - jnp.arange(slots)[None, :]) % slots
    return positions[:, None] - behind


def decode_attention(
    q: Float[Array, "batch heads dim"],
    k_cache: Float[Array, "batch slots kv_heads dim"],
    v_cache: Float[Array, "batch slots kv_heads dim"],
    sinks: Float[Array, "heads"],
    positions: Int[Array, "batch"],
    *,
    window: int | Int[Array, "#batch"] | None,
) -> Float[Array, "batch heads dim"]:
    """See the api."""
    batch, heads, dim = q.shape
    slots, kv_heads = k_cache.shape[1], k_cache.shape[2]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bkgd,bskd->bkgs", grouped, k_cache, preferred_element_type=jnp.float32) * dim**-0.5
    held = slot_positions(positions, slots)
    visible = held >= 0
    if window is not None:
        visible = visible & (held > positions[:, None] - jnp.asarray(window).reshape(-1, 1))
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1)
    weights = softmax_with_sink(logits, visible[:, None, None], sink)
    out = jnp.einsum("bkgs,bskd->bkgd", weights.astype(v_cache.dtype), v_cache, preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, dim).astype(q.dtype)
