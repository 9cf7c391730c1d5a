"""Reference for `prefix_attention`: the whole square of logits, masked."""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.prefix_attention.layout import PROMPT, Layout
from puzzle_jax.kernels.shapes import Array, Bool, Int, Keys, Queries, Sinks
from puzzle_jax.kernels.window_attention.reference import softmax_with_sink


def visible(
    layout: Layout, window: int | None, segment_ids: Int[Array, "batch seq"], positions: Int[Array, "batch seq"]
) -> Bool[Array, "batch seq seq"]:
    """The mask of keys (last axis) that each query sees."""
    seq = segment_ids.shape[1]
    query, key = jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]
    own = segment_ids[:, :, None] == segment_ids[:, None, :]
    of_prompt = (query >= layout.prefix) & (key < layout.prefix) & (segment_ids[:, None, :] == PROMPT)
    mask = (key <= query) & (own | of_prompt)
    if window is not None:
        mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
    return mask


def prefix_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks,
    *,
    layout: Layout,
    window: int | None,
    segment_ids: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
) -> Queries:
    """See the api."""
    batch, seq, heads, dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    mask = visible(layout, window, segment_ids, positions)
    sink = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1)
    weights = softmax_with_sink(logits, mask[:, None, None], sink)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)
