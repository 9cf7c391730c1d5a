"""Attention of a chunk of new tokens to the KV cache of earlier ones and to itself: for chunked prefill, and for the
verification of speculative tokens.

A row's chunk begins where its cache ends; rows may be at different positions. The cache is the ring of
`decode_attention` and does not hold the chunk yet. Implementations: `mosaic_gpu` for Hopper, where it has passed its
self-check; `blocks`, whose work grows with the cached tokens and not with the cache's size; `reference`, everything at
once.

Left out: chunks of different lengths per row (what follows the end of a shorter row is computed, and is meaningless),
and gradients.
"""

from __future__ import annotations

from functools import partial

from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.chunk_attention import blocks, mosaic_gpu, reference
from puzzle_jax.kernels.chunk_attention.trial import trial
from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.partition import by_rows_and_heads, spreads
from puzzle_jax.kernels.self_check import may_serve
from puzzle_jax.kernels.shapes import (
    Array,
    ChunkKeys,
    ChunkValues,
    KeyRing,
    Queries,
    Scale,
    Sinks,
    Starts,
    ValueRing,
    Window,
)
from puzzle_jax.kernels.sinks import given_or_weightless

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.chunk_attention,
    "blocks": blocks.chunk_attention,
    "reference": reference.chunk_attention,
}


def chunk_attention(
    q: Queries,
    k: ChunkKeys,
    v: ChunkValues,
    k_cache: KeyRing,
    v_cache: ValueRing,
    sinks: Sinks | None,
    start: Starts,
    *,
    window: Window,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Queries:
    """Attends causally from positions start, start + 1, ... of every row.

    Args:
      q: rotated queries of the chunk.
      k, v: rotated keys and values of the chunk, as a cache stores them.
      k_cache, v_cache: positions before `start`, in the ring order of `decode_attention`.
      sinks: one unscaled logit per query head; None for attention without sinks.
      start: position of the chunk's first token, one for all rows or one per row.
      window: as in `window_attention`.
      k_scale, v_scale: factors that stored numbers are multiplied by; None means 1.
      implementation: pins one of `IMPLEMENTATIONS`.
      mesh: as in `decode_attention`.

    Raises ValueError for shapes and dtypes that do not fit and windows below 1, NotImplementedError if the named
    implementation does not accept the arguments.
    """
    (batch, chunk, heads, dim), (kv_heads, slots) = q.shape, k_cache.shape[1::2]
    sinks = given_or_weightless(sinks, heads)
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
    if start.shape != ():
        expected["start"] = (start, (batch,))
    checks.shapes(f"q of shape {q.shape} with {slots} slots", expected)
    checks.window(window, batch)

    def attend(
        q: Array,
        k: Array,
        v: Array,
        k_cache: Array,
        v_cache: Array,
        sinks: Array,
        *,
        start: Array,
        window: Window,
        k_scale: Scale,
        v_scale: Scale,
    ) -> Array:
        cache = LayerCache(k_cache, v_cache, k_scale, v_scale)
        return dispatch(
            "chunk_attention",
            IMPLEMENTATIONS,
            implementation,
            q,
            k,
            v,
            cache,
            sinks,
            start,
            window=window,
            trial=partial(trial, q, cache, sinks, start, window, chunk_attention),
        )

    options = {"start": start, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    if spreads(mesh, heads, kv_heads) and may_serve():

        def by_heads(q: Array, *rest: Array, **options: Array | int | None) -> Array:
            return attend(q.swapaxes(1, 2), *rest, **options).swapaxes(1, 2)

        arrays = (q.swapaxes(1, 2), k, v, k_cache, v_cache)  # heads are the same axis in all
        return by_rows_and_heads(by_heads, mesh, arrays, 1, sinks, **options).swapaxes(1, 2)
    return attend(q, k, v, k_cache, v_cache, sinks, **options)
