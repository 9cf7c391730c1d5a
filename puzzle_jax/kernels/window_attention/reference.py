"""Reference for `window_attention`: the whole square of logits, masked."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Bool, Float, Keys, Queries, Segments, Sinks, Window

MASKED = -1e30  # finite, so that a query without keys gives zeros and not NaN
MOST_LOGITS = 2**27
"""Logits that an implementation may hold at a time, on all devices together; float32, so 0.5 GB."""


class OnlineSoftmax(NamedTuple):
    """A running softmax: the largest logit so far, and the sums of weights and of weighted values relative to it."""

    largest: Float[Array, "batch kv_heads rows"]
    total: Float[Array, "batch kv_heads rows"]
    out: Float[Array, "batch kv_heads rows dim"]

    def after(
        self, logits: Float[Array, "batch kv_heads rows keys"], values: Float[Array, "batch kv_heads keys dim"]
    ) -> OnlineSoftmax:
        """The softmax with one more block of keys (arXiv 1805.02867)."""
        largest = jnp.maximum(self.largest, jnp.max(logits, axis=-1))
        shrink, weights = jnp.exp(self.largest - largest), jnp.exp(logits - largest[..., None])
        found = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        total = self.total * shrink + jnp.sum(weights, axis=-1)
        return OnlineSoftmax(largest, total, self.out * shrink[..., None] + found)


def start_online(sink: Float[Array, "batch kv_heads rows"], dim: int) -> OnlineSoftmax:
    """The softmax before any keys: the sink is a key without a value."""
    return OnlineSoftmax(sink, jnp.ones_like(sink), jnp.zeros((*sink.shape, dim), jnp.float32))


def refuse_too_many(*shape: int) -> None:
    """Raises NotImplementedError for logits so many that they should be left to `online_blocks`."""
    if math.prod(shape) > MOST_LOGITS:
        raise NotImplementedError(f"logits of shape {shape} are too many at a time")


def softmax_with_sink(
    logits: Float[Array, "*rows keys"], mask: Bool[Array, "*#rows keys"], sink: Float[Array, "*#rows"]
) -> Float[Array, "*rows keys"]:
    """Softmax over the visible keys and one more logit per row, which is dropped from the result."""
    logits = jnp.where(mask, logits, MASKED)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), sink))
    weights = jnp.exp(logits - largest[..., None]) * mask
    return weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]


def visible_keys(seq: int, window: Window, segment_ids: Segments) -> Bool[Array, "rows seq seq"]:
    """The mask of keys (last axis) that each query sees; one row, or one per row of the batch if rows differ."""
    query, key = jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]
    mask = (key <= query)[None]
    if window is not None:
        mask = mask & (key > query - jnp.asarray(window).reshape(-1, 1, 1))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None
) -> Queries:
    """See the api."""
    batch, seq, heads, dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    mask = visible_keys(seq, window, segment_ids)
    sink = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1)
    weights = softmax_with_sink(logits, mask[:, None, None], sink)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)
