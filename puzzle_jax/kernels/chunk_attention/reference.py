"""Reference for `chunk_attention`: cached and own keys side by side, one masked softmax."""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import LayerCache, load, slot_positions
from puzzle_jax.kernels.shapes import ChunkKeys, ChunkValues, Queries, Sinks, Starts, Window
from puzzle_jax.kernels.window_attention.reference import softmax_with_sink


def chunk_attention(
    q: Queries, k: ChunkKeys, v: ChunkValues, cache: LayerCache, sinks: Sinks, start: Starts, *, window: Window
) -> Queries:
    """See the api."""
    batch, chunk, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    keys = jnp.concatenate([load(cache.k, jnp.float32), load(k, jnp.float32)], axis=3)
    values = jnp.concatenate([load(cache.v, jnp.float32), load(v, jnp.float32)], axis=2)
    keys = keys if cache.k_scale is None else keys * cache.k_scale
    values = values if cache.v_scale is None else values * cache.v_scale
    starts = start.reshape(-1, 1)
    query = starts + jnp.arange(chunk)
    key = jnp.concatenate([slot_positions(starts[:, 0] - 1, slots), query], axis=1)[:, None]
    query = query[:, :, None]
    visible = (key >= 0) & (key <= query)
    if window is not None:
        visible = visible & (key > query - jnp.asarray(window).reshape(-1, 1, 1))
    grouped = q.astype(jnp.float32).reshape(batch, chunk, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bqkgd,bkds->bkgqs", grouped, keys) * dim**-0.5
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
    weights = softmax_with_sink(logits, visible[:, None, None], sink)
    out = jnp.einsum("bkgqs,bksd->bqkgd", weights, values)
    return out.reshape(batch, chunk, heads, dim).astype(q.dtype)
