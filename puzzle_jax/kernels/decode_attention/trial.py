"""Trials of kernels of `decode_attention`: with rows at the start, in the middle and at the end of a cache, and past
the end if it is a ring."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.float8 import encode_e4m3
from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Heads, Sinks, Window

MOST_SLOTS, ROWS, SCALE = 8192, 6, 0.25


def trial(q: Heads, cache: LayerCache, sinks: Sinks, window: Window, run: Callable[..., Array]) -> Trial:
    """A trial for these arguments; `run` is the api. Slots are limited to `MOST_SLOTS` plus what tiles leave over."""
    (_, heads, dim), (kv_heads, slots) = q.shape, cache.k.shape[1::2]
    dtype, stored, group = jnp.dtype(q.dtype), jnp.dtype(cache.k.dtype), heads // kv_heads
    scaled, static = cache.k_scale is not None, window is None or isinstance(window, int)
    of_bytes = stored == jnp.uint8
    own = slots if slots <= MOST_SLOTS else MOST_SLOTS + slots % 128
    seen = "all" if window is None else str(window) if static else "data"
    name = f"{dtype.name} {'e4m3' if of_bytes else stored.name} {group} x {dim} slots {own} window {seen}"

    def arrays() -> tuple[Array, ...]:
        keys, scale = jax.random.split(jax.random.key(0), 4), jnp.float32(SCALE)
        queries = jax.random.normal(keys[0], (ROWS, kv_heads * group, dim), dtype)
        rings = [
            jax.random.normal(key, (ROWS, kv_heads, *shape), jnp.float32)
            for key, shape in zip(keys[1:3], ((dim, own), (own, dim)), strict=True)
        ]
        rings = [encode_e4m3(ring, scale) if of_bytes else ring.astype(stored) for ring in rings]
        own_sinks = jax.random.normal(keys[3], (heads,), sinks.dtype)
        last = own + own // 3 if window is not None else own - 1  # a ring that has wrapped
        positions = jnp.asarray([0, 1, own // 2, max(own - 2, 0), own - 1, last], jnp.int32)
        widths = jnp.asarray([max(1, own // part) for part in range(1, ROWS + 1)], jnp.int32)
        return queries, *rings, own_sinks, positions, scale, widths

    def attend(
        q: Array, k: Array, v: Array, sinks: Array, positions: Array, scale: Array, widths: Array, **named: str | None
    ) -> Array:
        scales = {"k_scale": scale, "v_scale": scale} if scaled else {}
        return run(q, k, v, sinks, positions, window=window if static else widths, **scales, **named)

    return Trial(name, arrays, attend)
