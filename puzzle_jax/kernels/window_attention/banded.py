"""`window_attention` for static windows: queries in blocks, each against its own and the previous block of keys.

Blocks are as wide as the window, so two of them hold every visible key, and time and memory grow with
sequence * window instead of sequence ** 2. Plain XLA, differentiable, for every platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Keys, Queries, Segments, Sinks, Window
from puzzle_jax.kernels.window_attention.reference import MASKED, refuse_too_many

MIN_BLOCK = 16


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None
) -> Queries:
    """See the api. Raises NotImplementedError if the band would not be narrower than the square."""
    batch, seq, heads, dim = q.shape
    if not isinstance(window, int):
        raise NotImplementedError("the window is not a static number")
    block = max(window, MIN_BLOCK)
    if 2 * block >= seq:
        raise NotImplementedError(f"two blocks of {block} already span the sequence of {seq}")
    padded = -(-seq // block) * block
    refuse_too_many(batch, heads, padded, 2 * block)
    pad = padded - seq

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, padded // block, block, *x.shape[2:])

    def with_previous(x: Array) -> Array:
        previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([previous, x], axis=2)

    kv_heads = k.shape[2]
    group = heads // kv_heads
    # Batched matmuls want [batch..., rows, columns]: query heads that share keys are rows of one matmul.
    queries = blocks((q * dim**-0.5).astype(q.dtype)).reshape(batch, -1, block, kv_heads, group, dim)
    queries = queries.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, kv_heads, block * group, dim)
    keys = with_previous(blocks(k)).transpose(0, 1, 3, 4, 2)
    values = with_previous(blocks(v)).transpose(0, 1, 3, 2, 4)
    logits = jnp.matmul(queries, keys, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, -1, kv_heads, block, group, 2 * block)
    # Positions within the band: query i of a block is at block + i, keys at 0 .. 2 block - 1.
    query, key = jnp.arange(block)[:, None] + block, jnp.arange(2 * block)[None, :]
    band = (key <= query) & (key > query - window)
    first = jnp.arange(padded // block)[:, None, None] == 0
    mask = (band & ~(first & (key < block)))[None]
    if segment_ids is not None:
        segments = blocks(segment_ids)
        mask = mask & (segments[..., :, None] == with_previous(segments)[..., None, :])
    logits = logits + jnp.where(mask, 0.0, MASKED)[:, :, None, :, None]
    sink = sinks.astype(jnp.float32).reshape(1, 1, kv_heads, 1, group)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), sink))
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1) + jnp.exp(sink - largest)
    weights = weights.astype(v.dtype).reshape(batch, -1, kv_heads, block * group, 2 * block)
    out = jnp.matmul(weights, values, preferred_element_type=jnp.float32)
    out = out.reshape(batch, -1, kv_heads, block, group, dim) / total[..., None]
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(batch, padded, heads, dim)[:, :seq].astype(q.dtype)
