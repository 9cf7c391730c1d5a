"""Trials of kernels of `chunk_attention`: with rows whose cache is empty, half full, full, and wrapped if it is a
ring."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.float8 import encode_e4m3
from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Queries, Sinks, Starts, Window

MOST_SLOTS, MOST_TOKENS, ROWS, SCALE = 8192, 512, 4, 0.25


def trial(
    q: Queries, cache: LayerCache, sinks: Sinks, start: Starts, window: Window, run: Callable[..., Array]
) -> Trial:
    """A trial for these arguments; `run` is the api. Slots are limited to `MOST_SLOTS` plus what tiles leave over;
    chunks are rounded up to a power of two, at most `MOST_TOKENS`. One start for all rows is halfway into the cache."""
    (_, chunk, heads, dim), (kv_heads, slots) = q.shape, cache.k.shape[1::2]
    dtype, stored, group = jnp.dtype(q.dtype), jnp.dtype(cache.k.dtype), heads // kv_heads
    scaled, static = cache.k_scale is not None, window is None or isinstance(window, int)
    of_bytes, by_row = stored == jnp.uint8, start.shape != ()
    tokens = min(1 << max(0, chunk - 1).bit_length(), MOST_TOKENS)
    own = slots if slots <= MOST_SLOTS else MOST_SLOTS + slots % 128
    seen = "all" if window is None else str(window) if static else "data"
    form = f"{dtype.name} {'e4m3' if of_bytes else stored.name} {group} x {dim}"
    name = f"{form} tokens {tokens}{' by row' if by_row else ''} slots {own} window {seen}"

    def arrays() -> tuple[Array, ...]:
        keys, scale = jax.random.split(jax.random.key(0), 6), jnp.float32(SCALE)
        queries = jax.random.normal(keys[0], (ROWS, tokens, kv_heads * group, dim), dtype)
        shapes = ((dim, tokens), (tokens, dim), (dim, own), (own, dim))
        held = [
            jax.random.normal(key, (ROWS, kv_heads, *shape), jnp.float32)
            for key, shape in zip(keys[1:5], shapes, strict=True)
        ]
        held = [encode_e4m3(x, scale) if of_bytes else x.astype(stored) for x in held]
        own_sinks = jax.random.normal(keys[5], (heads,), sinks.dtype)
        last = own + own // 3 if window is not None else own  # a ring that has wrapped
        starts = jnp.asarray([0, own // 2, own, last], jnp.int32)
        widths = jnp.asarray([max(1, own // part) for part in range(1, ROWS + 1)], jnp.int32)
        return queries, *held, own_sinks, starts if by_row else starts[1], scale, widths

    def attend(*given: Array, **named: str | None) -> Array:
        *arrays, scale, widths = given
        scales = {"k_scale": scale, "v_scale": scale} if scaled else {}
        return run(*arrays, window=window if static else widths, **scales, **named)

    return Trial(name, arrays, attend)
