"""`chunk_attention` by blocks of keys and an online softmax (arXiv 2205.14135) that starts at the sink.

Cached keys are read in blocks, and only as many as hold anything, in a loop of dynamic length, so that a long cache
costs nothing while it is empty. The queries meet the chunk's own keys in a few blocks, each against the keys that it
can see. If rows are at different positions, the loop reads what the longest needs. Plain XLA for every platform.
Left out: gradients (a loop of dynamic length has none).
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import LayerCache, load, slot_positions
from puzzle_jax.kernels.shapes import Array, ChunkKeys, ChunkValues, Queries, Sinks, Starts, Window
from puzzle_jax.kernels.window_attention.reference import MASKED, OnlineSoftmax, start_online

QUERY_BLOCK, KEY_BLOCK = 128, 512


def key_block(slots: int) -> int:
    """Number of cached keys read at a time."""
    return slots if slots <= KEY_BLOCK else math.gcd(slots, KEY_BLOCK)


def chunk_attention(
    q: Queries, k: ChunkKeys, v: ChunkValues, cache: LayerCache, sinks: Sinks, start: Starts, *, window: Window
) -> Queries:
    """See the api."""
    batch, chunk, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    group = heads // kv_heads
    # Rows of one key-value head are (position, head in group).
    queries = q.reshape(batch, chunk, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
    own_k, own_v = load(k, q.dtype), load(v, q.dtype)
    factor = dim**-0.5 if cache.k_scale is None else cache.k_scale * dim**-0.5
    reach = None if window is None else jnp.asarray(window).reshape(-1, 1, 1)
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, group)
    block = key_block(slots)
    starts = start.reshape(-1, 1)  # one for all rows, or one per row
    filled = jnp.minimum(jnp.max(start), slots)
    held = slot_positions(starts[:, 0] - 1, slots)

    outputs = []
    for first in range(0, chunk, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, chunk)
        rows = queries[:, :, first:last].reshape(batch, kv_heads, (last - first) * group, dim)
        positions = (starts + jnp.arange(first, last))[:, :, None]
        largest = jnp.broadcast_to(sink, (batch, kv_heads, last - first, group)).reshape(batch, kv_heads, -1)
        running = start_online(largest, dim)

        def attend(
            running: OnlineSoftmax, keys: Array, values: Array, key: Array, *, rows=rows, positions=positions
        ) -> OnlineSoftmax:
            key = key[:, None]
            visible = (key >= 0) & (key <= positions)
            if reach is not None:
                visible = visible & (key > positions - reach)
            mask = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)[:, None, :, None]
            mask = jnp.repeat(mask, group, axis=3)
            logits = jnp.matmul(rows, keys, preferred_element_type=jnp.float32) * factor
            return running.after(logits + mask.reshape(mask.shape[0], 1, -1, mask.shape[-1]), values)

        def cached(index: Array | int, running: OnlineSoftmax, attend=attend) -> OnlineSoftmax:
            keys = load(jax.lax.dynamic_slice_in_dim(cache.k, index * block, block, 3), q.dtype)
            values = load(jax.lax.dynamic_slice_in_dim(cache.v, index * block, block, 2), q.dtype)
            key = jax.lax.dynamic_slice_in_dim(held, index * block, block, 1)
            return attend(running, keys, values, key)

        if not isinstance(window, int) or first < window - 1:  # else no query of the block sees the cache
            if block == slots:  # the compiler would run most of the body of a one-step loop, needed or not
                running = jax.lax.cond(filled > 0, partial(cached, 0), lambda running: running, running)
            else:
                running = jax.lax.fori_loop(0, (filled + block - 1) // block, cached, running)
        oldest = max(0, first - window + 1) if isinstance(window, int) else 0
        key = starts + jnp.arange(oldest, last)
        running = attend(running, own_k[..., oldest:last], own_v[:, :, oldest:last], key)
        out = running.out / running.total[..., None]
        outputs.append(out.reshape(batch, kv_heads, last - first, group, dim))
    out = jnp.concatenate(outputs, axis=2).transpose(0, 2, 1, 3, 4)
    out = out if cache.v_scale is None else out * cache.v_scale
    return out.reshape(batch, chunk, heads, dim).astype(q.dtype)
