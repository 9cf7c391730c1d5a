"""Reference for `window_attention`: the whole square of logits, masked."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a query without keys gives zeros and not NaN


def softmax_with_sink(
    logits: Float[Array, "... queries keys"], mask: Bool[Array, "... queries keys"], sink: Float[Array, "..."]
) -> Float[Array, "... queries keys"]:
    """Softmax over the visible keys and one more logit, which is dropped from the result."""
    logits = jnp.where(mask, logits, MASKED)
    largest = jnp.maximum(jnp.max(logits, axis=-1), sink)
    weights = jnp.exp(logits - largest[..., None]) * mask
    return weights / (jnp.sum(weights, axis=-1) + jnp.exp(sink - largest))[..., None]


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
    query, key = jnp.arange(seq)[:, None], jnp.arange(seq)[None, :]
    mask = (key <= query)[None]
    if window is not None:
        mask = mask & (key > query - jnp.asarray(window).reshape(-1, 1, 1))
    if segment_ids is not None:
        mask = mask & (segment_ids[:, :, None] == segment_ids[:, None, :])
    sink = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1)
    weights = softmax_with_sink(logits, mask[:, None, None], sink)
    out = jnp.einsum("bkgqs,bskd->bqkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)
