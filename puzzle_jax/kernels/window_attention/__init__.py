"""Causal attention with learnable sinks or none, full or within a window, over grouped query heads.

A sink is one extra logit per query head that joins the softmax and is then dropped, so the weights of a query sum to
less than one. A window of W lets query i see the keys j with i - W < j <= i. Implementations: `mosaic_gpu_wide` (long
sequences and windows) and `mosaic_gpu` for Hopper and `splash` for TPUs, where they have passed their self-check;
`causal_blocks` (full attention and static windows) and `banded` (static windows far narrower than the sequence), whose
cost grows with what is visible; `square`, which takes any window, including one per row of the batch as data;
`online_blocks`, which takes the same, for sequences so long that the others would hold too many logits; `reference`;
and, only by name, `dew_flash_attn`.
On a mesh that shards positions, devices exchange positions for heads before and after any of these; see `parallel`.
"""

from __future__ import annotations

from functools import partial

from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.partition import by_rows_and_heads, spreads
from puzzle_jax.kernels.self_check import may_serve
from puzzle_jax.kernels.shapes import Array, Keys, Queries, Segments, Sinks, Window
from puzzle_jax.kernels.sinks import given_or_weightless
from puzzle_jax.kernels.window_attention import (
    banded,
    causal_blocks,
    dew,
    mosaic_gpu,
    online_blocks,
    parallel,
    reference,
    splash,
    square,
)
from puzzle_jax.kernels.window_attention.trial import trial

IMPLEMENTATIONS = {
    "mosaic_gpu_wide": mosaic_gpu.wide_attention,
    "mosaic_gpu": mosaic_gpu.window_attention,
    "splash": splash.window_attention,
    "dew_flash_attn": dew.window_attention,
    "causal_blocks": causal_blocks.window_attention,
    "banded": banded.window_attention,
    "square": square.window_attention,
    "online_blocks": online_blocks.window_attention,
    "reference": reference.window_attention,
}


def window_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks | None,
    *,
    window: Window,
    segment_ids: Segments = None,
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> Queries:
    """Attention of every position to itself and its past.

    Args:
      q, k, v: rotated queries and keys, and values. Query head h uses key-value head h // (heads / kv_heads).
      sinks: one unscaled logit per query head; None for attention without sinks.
      window: number of keys that a query sees, itself included; None means all; an array has one per row of the batch.
      segment_ids: positions see only positions of the same segment (packed sequences).
      implementation: pins one of `IMPLEMENTATIONS`.
      mesh: mesh with axes "data", "sequence" and "model" that shard rows, positions and heads, see `parallel`.
        Without one, or if it does not shard positions or divide them and heads, and no kernel may be used, XLA sees to
        it that every device has what it needs.

    Logits are scaled by dim ** -0.5; softmax in float32; differentiable in all arrays. Raises ValueError for shapes and
    dtypes that do not fit and windows below 1, NotImplementedError if no implementation accepts the arguments.
    """
    (batch, seq, heads, dim), kv_heads = q.shape, k.shape[2]
    sinks = given_or_weightless(sinks, heads)
    checks.floating(q=q, k=k, v=v, sinks=sinks)
    checks.heads(q, heads, "k", k, kv_heads)
    expected = {"k": (k, (batch, seq, kv_heads, dim)), "v": (v, k.shape), "sinks": (sinks, (heads,))}
    if segment_ids is not None:
        expected["segment_ids"] = (segment_ids, (batch, seq))
    checks.shapes(f"q of shape {q.shape}", expected)
    checks.window(window, batch)

    def attend(q: Array, k: Array, v: Array, sinks: Array, *, window: Window, segment_ids: Segments) -> Array:
        return dispatch(
            "window_attention",
            IMPLEMENTATIONS,
            implementation,
            q,
            k,
            v,
            sinks,
            window=window,
            segment_ids=segment_ids,
            trial=partial(trial, q, k, sinks, window, segment_ids, window_attention),
        )

    options = {"window": window, "segment_ids": segment_ids}
    if mesh is not None and parallel.cuts(q, mesh):
        return parallel.attention(q, k, v, sinks, attend, mesh=mesh, **options)
    if spreads(mesh, q.shape[2], kv_heads) and may_serve():
        # What XLA would do by itself, made explicit so that each device can run a kernel on its shard.
        return by_rows_and_heads(attend, mesh, (q, k, v), 2, sinks, **options)
    return attend(q, k, v, sinks, **options)
