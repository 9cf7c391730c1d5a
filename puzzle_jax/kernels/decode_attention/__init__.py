"""Attention of one new token per row to the row's KV cache.

The cache of a layer is a ring: position p is in slot p mod slots, so a windowed layer needs as many slots as its window
and a full one as many as the context. What a slot holds follows from the row's length alone. Keys are stored as
[dim, slots] and values as [slots, dim], the order in which both matmuls read them. Caches hold the compute dtype,
bfloat16, or bytes of e4m3 with one scale per tensor (`kernels.float8`), which is folded into logits and output.
Implementations: `mosaic_gpu` for Hopper and `mosaic_tpu`, where they have passed their self-check; `blocks`, for e4m3
on CPUs; `reference`, plain XLA.
"""

from __future__ import annotations

from functools import partial

from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.decode_attention import blocks, mosaic_gpu, mosaic_tpu, reference
from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.decode_attention.trial import trial
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.partition import by_rows_and_heads, spreads
from puzzle_jax.kernels.self_check import may_serve
from puzzle_jax.kernels.shapes import Array, Heads, KeyRing, Rows, Scale, Sinks, ValueRing, Window
from puzzle_jax.kernels.sinks import given_or_weightless

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.decode_attention,
    "mosaic_tpu": mosaic_tpu.decode_attention,
    "blocks": blocks.decode_attention,
    "reference": reference.decode_attention,
}


def decode_attention(
    q: Heads,
    k_cache: KeyRing,
    v_cache: ValueRing,
    sinks: Sinks | None,
    positions: Rows,
    *,
    window: Window,
    k_scale: Scale = None,
    v_scale: Scale = None,
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Heads:
    """Attends from position `positions` of each row, whose key and value are already in the cache.

    Args:
      q: rotated queries.
      k_cache, v_cache: rotated keys and values; slot s holds the last position p <= positions with p mod slots = s.
      sinks: one unscaled logit per query head; None for attention without sinks.
      positions: position of the query in its row.
      window: as in `window_attention`; positions older than it are not seen.
      k_scale, v_scale: factors that cached numbers are multiplied by; None means 1.
      implementation: pins one of `IMPLEMENTATIONS`.
      mesh: mesh with axes "data" and "model" that shard rows and heads, so that a kernel can run on each device's
        shard. Without one, XLA sees to it that every device has what it needs.

    Raises ValueError for shapes and dtypes that do not fit and windows below 1, NotImplementedError if no
    implementation accepts the arguments.
    """
    (batch, heads, dim), (kv_heads, slots) = q.shape, k_cache.shape[1::2]
    sinks = given_or_weightless(sinks, heads)
    checks.floating(q=q, sinks=sinks)
    checks.cached(k_cache=k_cache, v_cache=v_cache)
    checks.heads(q, heads, "k_cache", k_cache, kv_heads)
    expected = {
        "k_cache": (k_cache, (batch, kv_heads, dim, slots)),
        "v_cache": (v_cache, (batch, kv_heads, slots, dim)),
        "sinks": (sinks, (heads,)),
        "positions": (positions, (batch,)),
    }
    checks.shapes(f"q of shape {q.shape} with {slots} slots", expected)
    checks.window(window, batch)

    def attend(
        q: Array, k: Array, v: Array, sinks: Array, *, positions: Array, window: Window, k_scale: Scale, v_scale: Scale
    ) -> Array:
        cache = LayerCache(k, v, k_scale, v_scale)
        return dispatch(
            "decode_attention",
            IMPLEMENTATIONS,
            implementation,
            q,
            cache,
            sinks,
            positions,
            window=window,
            trial=partial(trial, q, cache, sinks, window, decode_attention),
        )

    options = {"positions": positions, "window": window, "k_scale": k_scale, "v_scale": v_scale}
    if spreads(mesh, heads, kv_heads) and may_serve():
        return by_rows_and_heads(attend, mesh, (q, k_cache, v_cache), 1, sinks, **options)
    return attend(q, k_cache, v_cache, sinks, **options)
