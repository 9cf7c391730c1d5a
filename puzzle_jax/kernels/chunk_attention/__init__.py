"""Attention of a chunk of new tokens against the cache of what came before, and against itself: chunked prefill.

All rows stand at the same position, the start of the chunk. The cache is the ring of `decode_attention` and does not
hold the chunk yet. Implementations: `blocks`, whose work follows the tokens that exist and not the cache's size;
`reference`, everything at once.
"""

from __future__ import annotations

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.chunk_attention import blocks, reference
from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.shapes import Array, IntScalar, KeyRing, Num, Queries, Scale, Sinks, ValueRing, Window

IMPLEMENTATIONS = {"blocks": blocks.chunk_attention, "reference": reference.chunk_attention}


def chunk_attention(
    q: Queries,
    k: Num[Array, "batch kv_heads dim chunk"],
    v: Num[Array, "batch kv_heads chunk dim"],
    k_cache: KeyRing,
    v_cache: ValueRing,
    sinks: Sinks,
    start: IntScalar,
    *,
    window: Window,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: str | None = None,
) -> Queries:
    """Attends causally from positions start, start + 1, ... of every row.

    Args:
      q: rotated queries of the chunk.
      k, v: rotated keys, and values, of the chunk as a cache stores them.
      k_cache, v_cache: positions before `start`, in the ring order of `decode_attention`.
      sinks: one unscaled logit per query head.
      start: position of the chunk's first token.
      window: as in `window_attention`.
      k_scale, v_scale: what stored numbers are multiplied by; None is 1.
      implementation: pins one of `IMPLEMENTATIONS`.

    Raises ValueError for shapes and dtypes that do not fit and windows below 1.
    """
    (batch, chunk, heads, dim), (kv_heads, slots) = q.shape, k_cache.shape[1::2]
    checks.floating(q=q, sinks=sinks)
    checks.cached(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    checks.heads(q, heads, "k_cache", k_cache, kv_heads)
    expected = {
        "k": (k, (batch, kv_heads, dim, chunk)),
        "v": (v, (batch, kv_heads, chunk, dim)),
        "k_cache": (k_cache, (batch, kv_heads, dim, slots)),
        "v_cache": (v_cache, (batch, kv_heads, slots, dim)),
        "sinks": (sinks, (heads,)),
    }
    checks.shapes(f"q of shape {q.shape} with {slots} slots", expected)
    checks.window(window, batch)
    cache = LayerCache(k_cache, v_cache, k_scale, v_scale)
    return dispatch("chunk_attention", IMPLEMENTATIONS, implementation, q, k, v, cache, sinks, start, window=window)
