"""Reference for `window_attention`: the whole square of logits, masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a query without keys gives zeros and not NaN


def softmax_with_sink(
    logits: Float[Array, "*rows keys"], mask: Bool[Array, "*#rows keys"], sink: Float[Array, "*#rows"]
) -> Float[Array, "*rows keys"]:
    """Softmax over the visible keys and one more logit per row, which is dropped from the result."""
    logits = jnp.where(mask, logits, MASKED)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), sink))
    weights = jnp.exp(logits - largest[..., None]) * mask
    return weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]


def visible_keys(
    seq: int, window: int | Int[Array, "#batch"] | None, segment_ids: Int[Array, "batch seq"] | None
) -> Bool[Array, "rows seq seq"]:
    """Which keys (last axis) each query sees; one row, or one per row of the batch where rows differ."""
    query, key = jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]
    mask = (key <= query)[None]
    if window is not None:
        mask = mask & (key > query - jnp.asarray(window).reshape(-1, 1, 1))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return mask


def window_attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads dim"],
    sinks: Float[Array, "heads"],
    *,
    window: int | Int[Array, "#batch"] | None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads dim"]:
    """See the api."""
    batch, seq, heads, dim = q.shape
    grouped = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], dim)
    logits = jnp.einsum("bqkgd,bskd->bkgqs", grouped, k, preferred_element_type=jnp.float32) * dim**-0.5
    mask = visible_keys(seq, window, segment_ids)
    sink = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1)
    weights = softmax_with_sink(logits, mask[:, None, None], sink)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)
