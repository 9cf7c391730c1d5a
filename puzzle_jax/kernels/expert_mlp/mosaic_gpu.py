"""The first matmul of `expert_mlp` on Hopper GPUs with its activation: rows in blocks of one expert each become the
inputs of the second matmul, and the product, which is twice as wide, never reaches global memory.

The products are those of `grouped_matmul.mosaic_gpu`. Gate and linear columns are interleaved, and the two of a pair
must end up in the same registers.

Packed (MXFP4): outputs are rows of bytes, so gates are every second row. Viewed as half as many rows of twice the
length, without moving a byte, gates are the first half of each row and linear parts the second. A program multiplies
its rows by 64 of both, and the two sums meet in registers in float32. The second matmul needs even and odd inputs
separated: a matrix of ones and zeros, 64 x 64, puts the result in that order, exactly, so that XLA need not.

Dense: outputs are adjacent columns, which no copy to shared memory can separate. The product goes to shared memory as
bfloat16, as it would without this kernel, and two matrices of ones and zeros, 64 x 32, extract the even and the odd
columns of 64 at a time, exactly: 64 inputs more than the matmul's own. A number that is not finite spreads over the 32
outputs next to it.

Left out: the second matmul, which needs whole rows of this result (docs/kernels.md); and gradients, which are those of
the matmul without an activation.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.expert_mlp.reference import SWIGLU_ALPHA
from puzzle_jax.kernels.grouped_matmul.mosaic_gpu import (
    Halves,
    dense_product,
    dense_tiles,
    even_and_odd,
    packed_products,
    packed_tiles,
)
from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, product, stored, swizzled
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights
from puzzle_jax.kernels.shapes import Array, BlockExperts, Float, Index, IntScalar, Matrices, Ref, Sorted

PARTED, HALF = 64, 32
"""Columns that are separated at a time, and gates among them."""

SLAB = 8
"""Rows of a swizzled tile that are contiguous in shared memory."""

Bias = Float[Array, "experts two_inter"]


def gate_up(
    rows: Sorted,
    weights: Weights,
    bias: Bias,
    expert: BlockExperts,
    used: IntScalar,
    *,
    limit: float | None,
    interpret: bool = False,
) -> Float[Array, "padded inter"] | Halves:
    """The activated product of rows in blocks of one expert each: rows of the intermediate, with packed weights in
    the form of `even_and_odd`. The result for blocks without rows is undefined.

    Args:
      rows: `padded / blocks` rows per block.
      weights: [experts, hidden, 2 * intermediate], gate and linear columns interleaved.
      bias: bias of the product.
      expert: expert of each block.
      used: number of blocks that hold rows, which come first.
      limit: SwiGLU clamp; None for plain SwiGLU.

    Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, for dtypes other than bfloat16,
    and for sizes that no tile divides.
    """
    hopper_only(interpret)
    if rows.dtype != jnp.bfloat16:
        raise NotImplementedError(f"for bfloat16, but rows are {rows.dtype}")
    # [experts, gate or linear, intermediate]
    parted = bias.astype(jnp.float32).reshape(len(bias), -1, 2).swapaxes(1, 2)
    if isinstance(weights, MXFP4):
        return _packed(rows, weights, parted, expert, used, limit, interpret)
    return _dense(rows, weights.astype(rows.dtype), parted, expert, used, limit, interpret)


def _activated(gate: Array, up: Array, limit: float | None) -> Array:
    """`reference.apply_swiglu` on registers."""
    if limit is None:
        return up * gate / (1.0 + jnp.exp(-gate))
    gate, up = jnp.minimum(gate, limit), jnp.minimum(jnp.maximum(up, -limit), limit)
    return (up + 1.0) * gate / (1.0 + jnp.exp(-SWIGLU_ALPHA * gate))


def _fetched_bias(bias: Ref, e: Index, first: Index, tile: Ref, arrived: Ref) -> None:
    """Starts the copy of an expert's bias for the outputs from `first` on."""
    mosaic = plgpu()
    mosaic.copy_gmem_to_smem(bias.at[e, :, pl.ds(first, tile.shape[1])], tile, arrived)


def _packed(
    rows: Sorted,
    weights: MXFP4,
    bias: Float[Array, "experts 2 inter"],
    expert: BlockExperts,
    used: IntScalar,
    limit: float | None,
    interpret: bool,
) -> Halves:
    experts, inputs, outputs = weights.shape
    count, inter = len(expert), outputs // 2
    name = "expert_mlp.mosaic_gpu_fused.packed"
    sizes = packed_tiles(name, len(rows), count, inputs, inter, matrices=2)
    block, tile_out = sizes.block, sizes.tile_out
    mosaic = plgpu()
    matrix, by_row = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(1)
    half_group, groups = GROUP // 2, tile_out // GROUP

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, codes: Ref, scales: Ref, biases: Ref, *refs: Ref) -> None:
        out, low, high, bias_tile, arrived = refs
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            e = experts_of[b]
            _fetched_bias(biases, e, n * tile_out, bias_tile, arrived)
            products = packed_products(sizes, x, codes.at[e], scales.at[e], b, n, low, high)
            mosaic.barrier_wait(arrived)

            def plus_bias(m: int) -> Array:
                own = mosaic.layout_cast(bias_tile[m], by_row)
                return products[m] + lax.broadcast_in_dim(own, (tile_out, block), (0,))

            def store(tile: Ref, order: Ref, parted: Ref) -> None:
                tile.T[...] = _activated(plus_bias(0), plus_bias(1), limit).astype(tile.dtype)
                row, column = (
                    mosaic.broadcasted_iota(jnp.int32, (tile_out, tile_out), axis, layout=matrix) for axis in (0, 1)
                )
                # The even outputs of all groups come first.
                source = 2 * row - jnp.where(row < tile_out // 2, 0, tile_out - 1)
                order[...] = jnp.where(column == source, 1.0, 0.0).astype(order.dtype)
                mosaic.commit_smem()
                parted.T[...] = product(order, tile.T, tile_out, block).astype(parted.dtype)
                # TMA copies what is contiguous in shared memory: 8 rows of one half of a group.
                places = itertools.product(range(2), range(groups), range(0, block, SLAB))
                stored(
                    *(
                        (
                            parted.at[pl.ds(first, SLAB), pl.ds((odd * groups + g) * half_group, half_group)],
                            out.at[odd, n * groups + g, pl.ds(b * block + first, SLAB)],
                        )
                        for odd, g, first in places
                    )
                )

            # In the shared memory that the pipeline's tiles were in.
            pl.run_scoped(
                store,
                mosaic.SMEM((block, tile_out), rows.dtype, transforms=swizzled(tile_out)),
                mosaic.SMEM((tile_out, tile_out), rows.dtype, transforms=swizzled(tile_out)),
                mosaic.SMEM((block, tile_out), rows.dtype, transforms=swizzled(half_group)),
            )

    scratch = [
        *sizes.decoded,
        mosaic.SMEM((2, tile_out), jnp.float32),
        mosaic.Barrier(),
    ]
    whole = jax.ShapeDtypeStruct((2, inter // GROUP, len(rows), half_group), rows.dtype)
    call = launched(kernel, whole, {"block": count, "tile": inter // tile_out}, scratch, interpret)
    codes, scales = (each.reshape(experts, inter, -1) for each in (weights.codes, weights.scales))
    return call(expert, used[None], even_and_odd(rows), codes, scales.swapaxes(1, 2), bias)


def _dense(
    rows: Sorted,
    weights: Matrices,
    bias: Float[Array, "experts 2 inter"],
    expert: BlockExperts,
    used: IntScalar,
    limit: float | None,
    interpret: bool,
) -> Sorted:
    _, inputs, outputs = weights.shape
    count = len(expert)
    sizes = dense_tiles("expert_mlp.mosaic_gpu_fused.dense", len(rows), count, inputs, outputs)
    block, tile_out, tile_inter = sizes.block, sizes.tile_out, sizes.tile_out // 2
    mosaic = plgpu()
    matrix, by_column = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(0)

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, w: Ref, biases: Ref, *refs: Ref) -> None:
        out, bias_tile, arrived = refs
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            e = experts_of[b]
            _fetched_bias(biases, e, n * tile_inter, bias_tile, arrived)
            whole = dense_product(sizes, x, w.at[e], b, n)
            mosaic.barrier_wait(arrived)

            def plus_bias(tile: Ref, ones: Ref, c: int, m: int) -> Array:
                own = mosaic.layout_cast(bias_tile[m, pl.ds(c * HALF, HALF)], by_column)
                some = product(tile.at[:, pl.ds(c * PARTED, PARTED)], ones.at[m], block, HALF)
                return some + lax.broadcast_in_dim(own, (block, HALF), (1,))

            def store(tile: Ref, activated: Ref, ones: Ref) -> None:
                tile[...] = whole.astype(tile.dtype)
                row, column = (
                    mosaic.broadcasted_iota(jnp.int32, (PARTED, HALF), axis, layout=matrix) for axis in (0, 1)
                )
                for m in range(2):
                    ones[m] = jnp.where(row == 2 * column + m, 1.0, 0.0).astype(ones.dtype)
                mosaic.commit_smem()
                for c in range(tile_out // PARTED):
                    gate, up = (plus_bias(tile, ones, c, m) for m in range(2))
                    activated[:, pl.ds(c * HALF, HALF)] = _activated(gate, up, limit).astype(activated.dtype)
                stored((activated, out.at[pl.ds(b * block, block), pl.ds(n * tile_inter, tile_inter)]))

            # In the shared memory that the pipeline's tiles were in.
            pl.run_scoped(
                store,
                mosaic.SMEM((block, tile_out), rows.dtype, transforms=swizzled(HALF)),
                mosaic.SMEM((block, tile_inter), rows.dtype, transforms=swizzled(HALF)),
                mosaic.SMEM((2, PARTED, HALF), rows.dtype, transforms=swizzled(HALF)),
            )

    scratch = [mosaic.SMEM((2, tile_inter), jnp.float32), mosaic.Barrier()]
    whole = jax.ShapeDtypeStruct((len(rows), outputs // 2), rows.dtype)
    call = launched(kernel, whole, {"block": count, "tile": outputs // tile_out}, scratch, interpret)
    return call(expert, used[None], rows, weights, bias)
