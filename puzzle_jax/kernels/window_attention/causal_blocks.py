"""`window_attention` for full causal attention and moderate windows: queries in a few blocks, each against the keys
that it can see.

It skips keys out of reach and keeps each block of logits small enough for caches; on CPU that is about three times as
fast as the whole square, forwards and backwards. Plain XLA, differentiable, for every platform.
Left out: windows far narrower than a block (see `banded`), and more than about eight blocks (each is unrolled into the
program).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Keys, Queries, Segments, Sinks, Window
from puzzle_jax.kernels.window_attention.reference import MASKED, refuse_too_many

MIN_BLOCK = 32
MAX_BLOCKS = 8


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None
) -> Queries:
    """See the api. Raises NotImplementedError for windows that are data or narrow, and for a single block."""
    if not (window is None or isinstance(window, int)):
        raise NotImplementedError("the window is not a static number")
    batch, seq, heads, dim = q.shape
    block = max(MIN_BLOCK, -(-seq // (MAX_BLOCKS * MIN_BLOCK)) * MIN_BLOCK)
    if seq <= block:
        raise NotImplementedError(f"the sequence of {seq} is a single block")
    if window is not None and block >= 4 * window:
        raise NotImplementedError(f"the window is much narrower than a block of {block}")
    refuse_too_many(batch, heads, block, seq if window is None else min(seq, block + window))
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # Batched matmuls want [batch, rows, columns]: query rows of one key-value head are (position, head in group).
    queries = (q * dim**-0.5).astype(q.dtype).reshape(batch, seq, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    keys, values = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, group)
    outputs = []
    for start in range(0, seq, block):
        end = min(start + block, seq)
        oldest = 0 if window is None else max(0, start - window + 1)
        rows = queries[:, :, start:end].reshape(batch, kv_heads, (end - start) * group, dim)
        logits = jnp.matmul(rows, keys[..., oldest:end], preferred_element_type=jnp.float32)
        query, key = jnp.arange(start, end)[:, None], jnp.arange(oldest, end)[None, :]
        mask = (key <= query)[None]
        if window is not None:
            mask = mask & (key > query - window)
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, oldest:end])
        logits = logits.reshape(batch, kv_heads, end - start, group, end - oldest)
        logits = logits + jnp.where(mask, 0.0, MASKED)[:, None, :, None]
        largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(logits, axis=-1), sink))
        weights = jnp.exp(logits - largest[..., None])
        total = jnp.sum(weights, axis=-1) + jnp.exp(sink - largest)
        weights = weights.astype(v.dtype).reshape(batch, kv_heads, (end - start) * group, end - oldest)
        out = jnp.matmul(weights, values[:, :, oldest:end], preferred_element_type=jnp.float32)
        outputs.append(out.reshape(batch, kv_heads, end - start, group, dim) / total[..., None])
    out = jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, seq, heads, dim).astype(q.dtype)
