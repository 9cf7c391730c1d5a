"""`window_attention` for static windows: queries in blocks, each against its own and the previous block of keys.

Blocks are as wide as the window, so two of them hold every visible key, and time and memory grow with
sequence * window in place of sequence ** 2. Plain XLA, differentiable, right on every platform.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels.window_attention.reference import softmax_with_sink

MIN_BLOCK = 16


def window_attention(
    q: Float[Array, "batch seq heads dim"],
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads dim"],
    sinks: Float[Array, "heads"],
    *,
    window: int | Int[Array, "#batch"] | None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads dim"]:
    """See the api. Raises NotImplementedError where the band would not be narrower than the square."""
    batch, seq, heads, dim = q.shape
    if not isinstance(window, int):
        raise NotImplementedError("the window is not a static number")
    block = max(window, MIN_BLOCK)
    if 2 * block >= seq:
        raise NotImplementedError(f"two blocks of {block} already span the sequence of {seq}")
    padded = -(-seq // block) * block
    pad = padded - seq
    segments = jnp.zeros((batch, seq), jnp.int32) if segment_ids is None else segment_ids

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, padded // block, block, *x.shape[2:])

    def with_previous(x: Array) -> Array:
        previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([previous, x], axis=2)

    kv_heads = k.shape[2]
    queries = blocks(q).reshape(batch, -1, block, kv_heads, heads // kv_heads, dim)
    keys, values = with_previous(blocks(k)), with_previous(blocks(v))
    logits = jnp.einsum("bnqkgd,bnskd->bnkgqs", queries, keys, preferred_element_type=jnp.float32) * dim**-0.5
    # Positions within the band: query i of a block stands at block + i, keys at 0 .. 2 block - 1.
    query, key = jnp.arange(block)[:, None] + block, jnp.arange(2 * block)[None, :]
    band = (key <= query) & (key > query - window)
    first = jnp.arange(padded // block)[:, None, None] == 0
    mask = band & ~(first & (key < block))
    segments = blocks(segments)
    same = segments[..., :, None] == with_previous(segments)[..., None, :]
    mask = (mask[None] & same)[:, :, None, None]
    sink = sinks.astype(jnp.float32).reshape(1, 1, kv_heads, -1, 1)
    weights = softmax_with_sink(logits, mask, sink)
    out = jnp.einsum("bnkgqs,bnskd->bnqkgd", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(batch, padded, heads, dim)[:, :seq].astype(q.dtype)
