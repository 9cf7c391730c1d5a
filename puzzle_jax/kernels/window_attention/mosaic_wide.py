"""The forward pass of `window_attention` on Hopper GPUs for long windows: 128 queries and three warpgroups per program.

Two warpgroups have 64 queries each and go over the same tiles of keys and values, which the third prefetches (warp
specialisation as in J. Shah et al., FlashAttention-3, 2024, arXiv 2407.08608). So a tile is read from L2 once for 128
queries, where `mosaic_gpu` reads it for 64: with heads of 64 numbers, that kernel reads 16 KB per million operations,
which at the rate of an H100's tensor cores would be 15 TB per second. On the other hand, both warpgroups visit every
tile that either of them sees, one more than they need, and a multiprocessor holds one program, with two computing
warpgroups, where it holds two or three of `mosaic_gpu`. Hence it is for windows of at least `MIN_REACH` keys.

Left out: overlapping the softmax of one warpgroup with products of the other, unmasked tiles, and gradients, which are
those of `mosaic_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.mosaic import launched, plgpu, product, swizzled
from puzzle_jax.kernels.shapes import Array, Float, Index, Int, Keys, Num, Queries, Ref, Rows, Sinks
from puzzle_jax.kernels.window_attention.mosaic_shape import TILE, Shape
from puzzle_jax.kernels.window_attention.reference import MASKED

WARPGROUPS = 2
QUERIES = WARPGROUPS * TILE
STEPS = 4
MIN_REACH = 1024
FETCHING_REGISTERS = 40


def forward(
    shape: Shape,
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks,
    segments: Int[Array, "batch seq"],
    widths: Rows,
    first: Int[Array, "batch blocks"],
) -> tuple[Queries, Float[Array, "batch heads seq"]]:
    """Output and lse'; `first` is the first tile of keys that each block of 64 queries sees."""
    mosaic = plgpu()
    matrix, dim, group = mosaic.Layout.WGMMA, shape.dim, shape.heads // shape.kv_heads
    by_row, by_column = matrix.reduce(1), matrix.reduce(0)

    def rows(values: Array, columns: int = TILE) -> Num[Array, "rows columns"]:
        return lax.broadcast_in_dim(mosaic.layout_cast(values, by_row), (TILE, columns), (0,))

    def kernel(sink_of: Ref, first_of: Ref, width_of: Ref, *refs: Ref) -> None:
        q_all, k_all, v_all, segment_of, out, lse, *tiles, arrived = refs
        own = lax.axis_index("warpgroup")
        b, h, i = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")
        first, width = first_of[b, i], width_of[b]

        def mine() -> list[Ref]:
            return [tile.at[own] for tile in tiles]

        def place(n: Index) -> Array:
            return jnp.minimum(first + n, shape.tiles - 1)

        def compute(run: Callable[[tuple[Array, ...]], tuple[Array, ...]]) -> None:
            q_tile, _, out_tile, lse_tile, own_segment = mine()
            here = pl.ds(i * QUERIES + own * TILE, TILE)
            for source, target in ((q_all.at[b, here, h], q_tile), (segment_of.at[b, here], own_segment)):
                mosaic.copy_gmem_to_smem(source, target, arrived.at[own])
                mosaic.barrier_wait(arrived.at[own])
            carry = (
                mosaic.layout_cast(lax.broadcast_in_dim(sink_of[h], (TILE,), ()), by_row),
                mosaic.layout_cast(jnp.ones((TILE,), jnp.float32), by_row),
                mosaic.layout_cast(jnp.zeros((TILE, dim), jnp.float32), matrix),
            )
            largest, total, vectors = run(carry)
            out_tile[...] = (vectors / rows(total, dim)).astype(out_tile.dtype)
            lse_tile[...] = largest + jnp.log(total)
            mosaic.commit_smem()
            mosaic.copy_smem_to_gmem(out_tile, out.at[b, here, h])
            mosaic.copy_smem_to_gmem(lse_tile, lse.at[b, h, here])
            mosaic.wait_smem_to_gmem(0)

        def step(
            index: tuple[Index, ...], k_tile: Ref, v_tile: Ref, segment: Ref, carry: tuple[Array, ...]
        ) -> tuple[Array, ...]:
            q_tile, p_tile, _, _, own_segment = mine()
            largest, total, vectors = carry
            logits = product(q_tile, k_tile.T, TILE, TILE) * dim**-0.5
            query = mosaic.broadcasted_iota(jnp.int32, (TILE, TILE), 0, layout=matrix) + (i * QUERIES + own * TILE)
            key = mosaic.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=matrix) + (first + index[0]) * TILE
            seen = key <= query
            if shape.windowed:
                seen = seen & (key > query - width)
            if shape.segments:
                of_key = lax.broadcast_in_dim(mosaic.layout_cast(segment[...], by_column), (TILE, TILE), (1,))
                seen = seen & (rows(own_segment[...]) == of_key)
            logits = jnp.where(seen, logits, MASKED)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.where(seen, jnp.exp(logits - rows(new)), 0.0)
            shrink = jnp.exp(largest - new)
            p_tile[...] = weights.astype(jnp.bfloat16)
            mosaic.commit_smem()
            vectors = vectors * rows(shrink, dim) + product(p_tile, v_tile, TILE, dim)
            return new, total * shrink + jnp.sum(weights, axis=1), vectors

        vectors = mosaic.BlockSpec(
            (TILE, None, dim), lambda n: (place(n), lax.div(h, group), 0), transforms=swizzled(dim)
        )
        pipeline = mosaic.emit_pipeline_warp_specialized(
            step,
            grid=((i + 1) * WARPGROUPS - first,),
            memory_registers=FETCHING_REGISTERS,
            in_specs=[vectors, vectors, mosaic.BlockSpec((TILE,), lambda n: (place(n),))],
            max_concurrent_steps=STEPS,
            wg_axis="warpgroup",
            num_compute_wgs=WARPGROUPS,
            compute_context=compute,
        )
        pipeline(k_all.at[b], v_all.at[b], segment_of.at[b])

    def each(columns: int) -> object:
        """A tile of shared memory for each computing warpgroup."""
        return mosaic.SMEM((WARPGROUPS, TILE, columns), jnp.bfloat16, transforms=swizzled(columns))

    scalars = [mosaic.SMEM((WARPGROUPS, TILE), dtype) for dtype in (jnp.float32, jnp.int32)]
    scratch = [each(dim), each(TILE), each(dim), *scalars, mosaic.Barrier(num_barriers=WARPGROUPS)]
    per_query = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.seq), jnp.float32)
    outputs = [jax.ShapeDtypeStruct(q.shape, q.dtype), per_query]
    grid = {"row": shape.batch, "head": shape.heads, "tile": shape.seq // QUERIES}
    call = launched(kernel, outputs, grid, scratch, shape.interpret, {"warpgroup": WARPGROUPS + 1})
    of_blocks = jnp.min(first.reshape(shape.batch, -1, WARPGROUPS), axis=2)
    out, lse = call(sinks, of_blocks, widths, q, k, v, segments)
    return out, lse
