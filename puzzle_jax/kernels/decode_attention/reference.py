"""Reference for `decode_attention`: all slots, masked by the positions that they hold.

Plain XLA, and fast on CPU too: with keys stored [dim, slots] and values [slots, dim], both products are matmuls that
read the cache in memory order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from puzzle_jax.kernels.float8 import decode_e4m3
from puzzle_jax.kernels.shapes import Array, Float, Heads, Int, KeyRing, Num, Rows, Scale, Sinks, ValueRing, Window
from puzzle_jax.kernels.window_attention.reference import softmax_with_sink


class LayerCache(NamedTuple):
    """Rotated keys and values of one layer as they are stored, and their scales if they have any."""

    k: KeyRing
    v: ValueRing
    k_scale: Scale = None
    v_scale: Scale = None

    @property
    def slots(self) -> int:
        return self.k.shape[3]


def slot_positions(positions: Int[Array, "*batch"], slots: int) -> Int[Array, "*batch slots"]:
    """The position that each ring slot holds once `positions` has been written; negative for empty slots."""
    behind = (positions[..., None] - jnp.arange(slots)) % slots
    return positions[..., None] - behind


def seen_slots(
    position: Int[Array, "*batch"], width: Int[Array, "*batch"], slots: int
) -> tuple[Int[Array, "*batch"], Int[Array, "*batch"]]:
    """The first and the last slot that `position` may see within `width`: all slots once the ring has wrapped."""
    first = jnp.where(position < slots, jnp.maximum(position - width + 1, 0), 0)
    return first, jnp.minimum(position, slots - 1)


def load(stored: Num[Array, "*shape"], dtype: jnp.dtype | type) -> Float[Array, "*shape"]:
    """Cached numbers in the compute dtype, without their scale."""
    return decode_e4m3(stored, dtype) if stored.dtype == jnp.uint8 else stored.astype(dtype)


def decode_attention(q: Heads, cache: LayerCache, sinks: Sinks, positions: Rows, *, window: Window) -> Heads:
    """See the api."""
    batch, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    factor = dim**-0.5 if cache.k_scale is None else cache.k_scale * dim**-0.5
    logits = jnp.matmul(grouped, load(cache.k, q.dtype), preferred_element_type=jnp.float32) * factor
    held = slot_positions(positions, slots)
    visible = held >= 0
    if window is not None:
        visible = visible & (held > positions[:, None] - jnp.asarray(window).reshape(-1, 1))
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1)
    weights = softmax_with_sink(logits, visible[:, None, None], sink)
    out = jnp.matmul(weights.astype(q.dtype), load(cache.v, q.dtype), preferred_element_type=jnp.float32)
    out = out if cache.v_scale is None else out * cache.v_scale
    return out.reshape(batch, heads, dim).astype(q.dtype)
