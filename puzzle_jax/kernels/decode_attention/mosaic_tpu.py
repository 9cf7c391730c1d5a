"""`decode_attention` on TPUs, in Pallas: a program per row and key-value head, a step per tile of the cache.

The query heads that share a key-value head are the rows of both products. Position and window of every row are
prefetched, so that tiles without visible slots are neither fetched nor read: the pipeline keeps the tile that it has.
Bytes of e4m3 are decoded in the kernel; their scales are folded into logits and output. The softmax runs online over
the tiles and starts from the sink, as from a key without a value.

Left out: several query tokens, and several rows per program.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from puzzle_jax.kernels.decode_attention.reference import LayerCache, seen_slots
from puzzle_jax.kernels.float8 import e4m3_values
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, Float, Heads, Index, Num, Ref, Rows, Scale, Sinks, Window
from puzzle_jax.kernels.window_attention.reference import MASKED

LANES = 128
TILES = (2048, 1024, 512, 256, 128)
MAX_WHOLE = 4096
MIN_ROWS = 16


def decode_attention(
    q: Heads, cache: LayerCache, sinks: Sinks, positions: Rows, *, window: Window, interpret: bool = False
) -> Heads:
    """See the api. Raises NotImplementedError off TPUs unless interpreted, and for more than 4,096 slots that no tile
    divides."""
    if not interpret and target_platform() != "tpu":
        raise NotImplementedError(f"for TPUs, but this is {target_platform()}")
    batch, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    tile = next((tile for tile in TILES if slots % tile == 0), slots)
    if tile > MAX_WHOLE:
        raise NotImplementedError(f"{slots} slots are no multiple of {TILES[-1]}, and too many for one tile")
    group = heads // kv_heads
    rows = max(MIN_ROWS, -(-group // 8) * 8)
    fill = ((0, 0), (0, 0), (0, rows - group), (0, 0))
    grouped = jnp.pad(q.reshape(batch, kv_heads, group, dim), fill)
    wide = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1), (1, kv_heads, group, LANES))
    widths = jnp.broadcast_to(jnp.asarray(slots if window is None else window, jnp.int32), (batch,))
    # Two factors that every program reads, one for the logits and one for the output.
    scales = jnp.stack([dim**-0.5 * _or_one(cache.k_scale), _or_one(cache.v_scale)])

    def tiles_of(b: Index, position: Ref, width: Ref) -> tuple[Array, Array]:
        """The first and the last tile with slots that row `b` sees."""
        first, last = seen_slots(position[b], width[b], slots)
        return lax.div(first, tile), lax.div(last, tile)  # `//` of possibly negative numbers is beyond TPUs here

    def kernel(position: Ref, width: Ref, scale: Ref, q: Ref, sink: Ref, k: Ref, v: Ref, out: Ref, *carry: Ref) -> None:
        largest, total, mixed = carry
        b, t = pl.program_id(0), pl.program_id(2)
        first, last = tiles_of(b, position, width)

        @pl.when(t == 0)
        def _() -> None:
            largest[...] = sink[0, 0]
            total[...] = jnp.ones_like(total)
            mixed[...] = jnp.zeros_like(mixed)

        @pl.when((t >= first) & (t <= last))
        def _() -> None:
            keys, values = (_loaded(stored[0, 0], q.dtype) for stored in (k, v))
            logits = jnp.dot(q[0, 0], keys, preferred_element_type=jnp.float32) * scale[0]
            slot = lax.broadcasted_iota(jnp.int32, logits.shape, 1) + t * tile
            # A slot holds the last position with its number; the distance to the query decides whether it is seen.
            behind = lax.rem(position[b], slots) - slot
            behind = jnp.where(behind < 0, behind + slots, behind)
            seen = (behind <= position[b]) & (behind < width[b])
            logits = jnp.where(seen, logits, MASKED)
            before = largest[:, :1]
            now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(logits - now), 0.0)
            shrink = jnp.exp(before - now)
            mixed[...] = mixed[...] * shrink + jnp.dot(
                weights.astype(q.dtype), values, preferred_element_type=jnp.float32
            )
            total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
            largest[...] = jnp.broadcast_to(now, largest.shape)

        @pl.when(t == slots // tile - 1)
        def _() -> None:
            out[0, 0] = (mixed[...] / total[:, :1] * scale[1]).astype(out.dtype)

    def cache_tile(b: Index, t: Index, position: Ref, width: Ref) -> Array:
        first, last = tiles_of(b, position, width)
        return jnp.clip(t, first, last)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(batch, kv_heads, slots // tile),
        in_specs=[
            pl.BlockSpec((1, 1, rows, dim), lambda b, h, t, *_: (b, h, 0, 0)),
            pl.BlockSpec((1, 1, rows, LANES), lambda b, h, t, *_: (0, h, 0, 0)),
            pl.BlockSpec((1, 1, dim, tile), lambda b, h, t, p, w, _: (b, h, 0, cache_tile(b, t, p, w))),
            pl.BlockSpec((1, 1, tile, dim), lambda b, h, t, p, w, _: (b, h, cache_tile(b, t, p, w), 0)),
        ],
        out_specs=pl.BlockSpec((1, 1, rows, dim), lambda b, h, t, *_: (b, h, 0, 0)),
        scratch_shapes=[
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, LANES), jnp.float32),
            pltpu.VMEM((rows, dim), jnp.float32),
        ],
    )
    cached = 2 * batch * kv_heads * slots * dim
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, rows, dim), q.dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * cached * rows,
            bytes_accessed=cached * cache.k.dtype.itemsize,
            transcendentals=batch * kv_heads * rows * slots,
        ),
        interpret=interpret,
    )
    out = call(positions, widths, scales, grouped, jnp.pad(wide, fill), cache.k, cache.v)
    return out[:, :, :group].reshape(batch, heads, dim)


def _or_one(scale: Scale) -> Float[Array, ""]:
    return jnp.float32(1.0) if scale is None else scale.astype(jnp.float32)


def _loaded(stored: Num[Array, "some others"], dtype: jnp.dtype | type) -> Float[Array, "some others"]:
    """Cached numbers in the compute dtype, without their scale."""
    if stored.dtype != jnp.uint8:
        return stored.astype(dtype)
    return e4m3_values(stored.astype(jnp.int32)).astype(dtype)
