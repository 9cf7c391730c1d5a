"""Reference for `chunk_attention`: cached and own keys side by side, one masked softmax."""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import load, slot_positions
from puzzle_jax.kernels.shapes import Array, Float, IntScalar, KeyRing, Num, Scale, Sinks, ValueRing, Window
from puzzle_jax.kernels.window_attention.reference import softmax_with_sink


def chunk_attention(
    q: Float[Array, "batch chunk heads dim"],
    k: Num[Array, "batch kv_heads dim chunk"],
    v: Num[Array, "batch kv_heads chunk dim"],
    k_cache: KeyRing,
    v_cache: ValueRing,
    sinks: Sinks,
    start: IntScalar,
    *,
    window: Window,
    k_scale: Scale = None,
    v_scale: Scale = None,
) -> Float[Array, "batch chunk heads dim"]:
    """See the api."""
    batch, chunk, heads, dim = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[3]
    keys = jnp.concatenate([load(k_cache, jnp.float32), load(k, jnp.float32)], axis=3)
    values = jnp.concatenate([load(v_cache, jnp.float32), load(v, jnp.float32)], axis=2)
    keys = keys if k_scale is None else keys * k_scale
    values = values if v_scale is None else values * v_scale
    query = start + jnp.arange(chunk)
    key = jnp.concatenate([slot_positions(start - 1, slots), query])
    visible = ((key >= 0) & (key <= query[:, None]))[None]
    if window is not None:
        visible = visible & (key > query[:, None] - jnp.asarray(window).reshape(-1, 1, 1))
    grouped = q.astype(jnp.float32).reshape(batch, chunk, kv_heads, heads // kv_heads, dim)
    logits = jnp.einsum("bqkgd,bkds->bkgqs", grouped, keys) * dim**-0.5
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
    weights = softmax_with_sink(logits, visible[:, None, None], sink)
    out = jnp.einsum("bkgqs,bksd->bqkgd", weights, values)
    return out.reshape(batch, chunk, heads, dim).astype(q.dtype)
