"""`decode_attention` on CPUs from a cache of e4m3 bytes, by blocks of slots and an online softmax (arXiv 2205.14135).

A CPU has no arithmetic for e4m3 and writes out the decoded numbers before it multiplies by them, which costs as much as
the product. One block at a time, they stay in the CPU's caches, and only blocks that hold anything for any row are
decoded: a long cache costs little while it is empty. A block without visible slots adds exactly zero, so a row's result
does not depend on how far other rows have come. Left out: other dtypes, which `reference` reads as they are.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.decode_attention.reference import LayerCache, load, slot_positions
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, Heads, Rows, Sinks, Window
from puzzle_jax.kernels.window_attention.reference import MASKED, OnlineSoftmax, start_online

BLOCK = 128


def decode_attention(q: Heads, cache: LayerCache, sinks: Sinks, positions: Rows, *, window: Window) -> Heads:
    """See the api."""
    batch, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    block = math.gcd(slots, BLOCK)
    if target_platform() != "cpu" or cache.k.dtype != jnp.uint8:
        raise NotImplementedError(f"for e4m3 on CPUs, but this is {cache.k.dtype} on {target_platform()}")
    if block == slots or block < BLOCK // 2:
        raise NotImplementedError(f"{slots} slots are not several blocks of {BLOCK} or {BLOCK // 2}")
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, dim)
    factor = dim**-0.5 if cache.k_scale is None else cache.k_scale * dim**-0.5
    held = slot_positions(positions, slots)
    visible = held >= 0
    if window is not None:
        visible = visible & (held > positions[:, None] - jnp.asarray(window).reshape(-1, 1))
    mask = jnp.where(visible, 0.0, MASKED).astype(jnp.float32)

    def attend(index: Array, running: OnlineSoftmax) -> OnlineSoftmax:
        def part(x: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, index * block, block, axis)

        logits = jnp.matmul(grouped, load(part(cache.k, 3), q.dtype), preferred_element_type=jnp.float32) * factor
        return running.after(logits + part(mask, 1)[:, None, None], load(part(cache.v, 2), q.dtype))

    sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, kv_heads, -1), grouped.shape[:3])
    filled = jnp.minimum(jnp.max(positions) + 1, slots)
    found = jax.lax.fori_loop(0, (filled + block - 1) // block, attend, start_online(sink, dim))
    out = found.out / found.total[..., None]
    out = out if cache.v_scale is None else out * cache.v_scale
    return out.reshape(batch, heads, dim).astype(q.dtype)
