"""Trials of kernels of `window_attention`: with one row, few heads and a sequence of at most 4,096 tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Keys, Queries, Segments, Sinks, Window

MOST_KV_HEADS, MOST_TOKENS = 2, 4096


def trial(q: Queries, k: Keys, sinks: Sinks, window: Window, segment_ids: Segments, run: Callable[..., Array]) -> Trial:
    """A trial for these arguments; `run` is the api. Sequences are rounded up to a power of two."""
    (_, seq, heads, dim), dtype = q.shape, jnp.dtype(q.dtype)
    group, kv_heads = heads // k.shape[2], min(MOST_KV_HEADS, k.shape[2])
    static = window is None or isinstance(window, int)
    tokens = min(1 << max(0, seq - 1).bit_length(), MOST_TOKENS)
    width = None if isinstance(window, int) and window >= seq else window
    seen = "all" if width is None else str(width) if static else "data"
    packed = segment_ids is not None
    name = f"{dtype.name} {group} x {dim} tokens {tokens} window {seen}{' segments' if packed else ''}"

    def arrays() -> tuple[Array, ...]:
        keys = jax.random.split(jax.random.key(0), 4)
        of_heads = (kv_heads * group, kv_heads, kv_heads)
        qkv = [
            jax.random.normal(key, (1, tokens, count, dim), dtype) for key, count in zip(keys, of_heads, strict=False)
        ]
        own_sinks = jax.random.normal(keys[3], (kv_heads * group,), sinks.dtype)
        # Two segments, the first with a third of the tokens; used only if the arguments have segments.
        segments = (jnp.arange(tokens) * 3 >= tokens).astype(jnp.int32)[None]
        return *qkv, own_sinks, segments, jnp.full((1,), max(tokens // 3, 1), jnp.int32)

    def attend(
        q: Array, k: Array, v: Array, sinks: Array, segments: Array, widths: Array, **named: str | None
    ) -> Array:
        options = {"window": width if static else widths, "segment_ids": segments if packed else None}
        return run(q, k, v, sinks, **options, **named)

    return Trial(name, arrays, attend, differentiable=(0, 1, 2, 3))
