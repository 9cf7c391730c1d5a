"""`grouped_matmul` on Hopper GPUs, in Pallas' Mosaic GPU: a grid step per block of rows and tile of outputs.

Dense: the block of rows is wgmma's left operand, the expert's tile the right one; both arrive by TMA in a pipeline.

Packed (MXFP4): the weights are the left operand and the rows the right one, so few rows cost few columns; wgmma takes
at least 64 outputs and at least 8 rows. Packed bytes arrive by TMA, are decoded in registers and go to shared memory as
bfloat16. They cross global memory once. Codes are stored two to a byte, input 2j low and input 2j + 1 high: even and
odd inputs are separate products and nothing is interleaved. A wgmma takes 16 of either, which is a group of 32 inputs
with one scale per output. When transposed, for the gradient of the rows, the rows are the left operand again; even and
odd inputs are separate sums, which XLA interleaves.

Left out: clusters with multicast, a persistent grid, stores of single rows (blocks are padded), and weights decoded
straight into the registers that wgmma reads, which the interpreter of this backend cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.grouped_matmul.layout import mean_share
from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, stored, swizzled
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights, code_values, scale_values
from puzzle_jax.kernels.shapes import Array, BlockExperts, Float, Index, IntScalar, Matrices, Ref, Sorted
from puzzle_jax.kernels.tiles import tiles

DENSE_TILE_IN, DENSE_TILE_OUT, DENSE_STEPS = 64, (192, 128, 64), 4
PACKED_TILE_OUT, PACKED_GROUPS, PACKED_STEPS = 64, (8, 4, 2, 1), 4
BACK_STEP, BACK_GROUPS = 64, {64: (6, 4, 2), 128: (4, 2)}  # outputs per step; groups per tile by rows of a block
MIN_DENSE_ROWS, MIN_PACKED_ROWS = 64, 8

Halves = Float[Array, "2 groups padded half_group"]
"""Rows split into even and odd inputs, and each into groups of 32 inputs."""


def block_rows(rows: int, num_experts: int, packed: bool) -> int:
    """Rows per block, from the least that wgmma takes to 128.

    Packed weights are decoded once per block, so fewer blocks are worth more than less padding.
    """
    least = MIN_PACKED_ROWS if packed else MIN_DENSE_ROWS
    return mean_share("mosaic_gpu", rows, num_experts, packed, least=least, most=128)


def block_matmul(
    rows: Sorted,
    weights: Weights,
    expert: BlockExperts,
    used: IntScalar,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Sorted:
    """See the api. Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, for dtypes other
    than bfloat16, and for sizes that no tile divides."""
    hopper_only(interpret)
    if rows.dtype != jnp.bfloat16:
        raise NotImplementedError(f"for bfloat16, but rows are {rows.dtype}")
    if isinstance(weights, MXFP4):
        if transposed:
            return _packed_transposed(rows, weights, expert, used, interpret)
        return packed_matmul(even_and_odd(rows), weights, expert, used, interpret=interpret)
    return _dense(rows, weights.astype(rows.dtype), expert, used, transposed, interpret)


def dividing(size: int, tiles: tuple[int, ...], what: str) -> int:
    """The first tile that divides the size. Raises NotImplementedError if none does."""
    for tile in tiles:
        if size % tile == 0:
            return tile
    raise NotImplementedError(f"{size} {what} are no multiple of {tiles[-1]}")


def decoded_groups(codes: Ref, scales: Ref, groups: int, dtype: jnp.dtype) -> Iterator[tuple[Array, Array]]:
    """Yields the decoded even and odd inputs of each group of a tile."""
    pairs = codes[...].astype(jnp.int32)
    for g in range(groups):
        pair = pairs[:, g * GROUP // 2 : (g + 1) * GROUP // 2]
        scale = lax.broadcast_in_dim(scale_values(scales[g]), pair.shape, (0,))
        yield (code_values(pair & 0xF) * scale).astype(dtype), (code_values(pair >> 4) * scale).astype(dtype)


@dataclass(frozen=True)
class DenseTiles:
    """How the product of a block of rows and a tile of a dense matrix is split into steps.

    Attributes:
      block: rows per block.
      tile_in: inputs per step.
      tile_out: outputs per tile.
      steps: number of tiles of inputs.
      ring: tiles in shared memory at a time.
      transposed: whether outputs and inputs are swapped.
    """

    block: int
    tile_in: int
    tile_out: int
    steps: int
    ring: int
    transposed: bool = False


def dense_tiles(
    operation: str, rows: int, count: int, inputs: int, outputs: int, *, transposed: bool = False
) -> DenseTiles:
    """Tiles for `count` blocks of `rows` rows in total. Raises NotImplementedError for sizes that no tile divides."""
    block = rows // count
    if block % MIN_DENSE_ROWS:
        raise NotImplementedError(f"blocks of {block} rows are no multiple of {MIN_DENSE_ROWS}")
    tile_in = dividing(inputs, (DENSE_TILE_IN,), "inputs")
    default = dividing(outputs, DENSE_TILE_OUT, "outputs")
    chosen = tiles(operation, block, tile_out=default, steps=DENSE_STEPS)
    tile_out = default if outputs % chosen["tile_out"] else chosen["tile_out"]
    steps = inputs // tile_in
    return DenseTiles(block, tile_in, tile_out, steps, min(chosen["steps"], steps), transposed)


def dense_product(sizes: DenseTiles, x: Ref, w: Ref, b: Index, n: Index) -> Float[Array, "block tile_out"]:
    """In a kernel: block `b` of the rows times tile `n` of one matrix."""
    mosaic = plgpu()
    block, tile_in, tile_out, transposed = sizes.block, sizes.tile_in, sizes.tile_out, sizes.transposed
    delay = min(1, sizes.steps - 1)  # the previous step's wgmma still reads its tile
    weight_tile = (tile_out, tile_in) if transposed else (tile_in, tile_out)

    def run(total: Ref) -> Float[Array, "block tile_out"]:
        def step(_: tuple[Index], x_tile: Ref, w_tile: Ref) -> None:
            mosaic.wgmma(total, x_tile, w_tile.T if transposed else w_tile)

        pipeline = mosaic.emit_pipeline(
            step,
            grid=(sizes.steps,),
            in_specs=[
                mosaic.BlockSpec((block, tile_in), lambda k: (b, k), transforms=swizzled(tile_in), delay_release=delay),
                mosaic.BlockSpec(
                    weight_tile,
                    (lambda k: (n, k)) if transposed else (lambda k: (k, n)),
                    transforms=swizzled(weight_tile[1]),
                    delay_release=delay,
                ),
            ],
            max_concurrent_steps=sizes.ring,
        )
        pipeline(x, w)
        return total[...]

    return pl.run_scoped(run, mosaic.ACC((block, tile_out)))


def _dense(
    rows: Sorted, weights: Matrices, expert: BlockExperts, used: IntScalar, transposed: bool, interpret: bool
) -> Sorted:
    inputs, outputs = weights.shape[:0:-1] if transposed else weights.shape[1:]
    count = len(expert)
    name = "grouped_matmul.mosaic_gpu.dense"
    sizes = dense_tiles(name, len(rows), count, inputs, outputs, transposed=transposed)
    block, tile_out = sizes.block, sizes.tile_out

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, w: Ref, out: Ref, tile: Ref) -> None:
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            tile[...] = dense_product(sizes, x, w.at[experts_of[b]], b, n).astype(tile.dtype)
            stored((tile, out.at[pl.ds(b * block, block), pl.ds(n * tile_out, tile_out)]))

    result = plgpu().SMEM((block, tile_out), rows.dtype, transforms=swizzled(tile_out))
    whole = jax.ShapeDtypeStruct((len(rows), outputs), rows.dtype)
    call = launched(kernel, whole, {"block": count, "tile": outputs // tile_out}, [result], interpret)
    return call(expert, used[None], rows, weights)


@dataclass(frozen=True)
class PackedTiles:
    """How the product of tiles of packed matrices and a block of rows is split into steps.

    Attributes:
      block: rows per block.
      tile_out: outputs per tile.
      groups: groups of inputs per step.
      steps: number of tiles of inputs.
      ring: tiles in shared memory at a time.
      matrices: number of matrices that the rows are multiplied by at once, side by side along the inputs.
    """

    block: int
    tile_out: int
    groups: int
    steps: int
    ring: int
    matrices: int = 1

    @property
    def decoded(self) -> list[object]:
        """Shared memory for the even and the odd inputs that a step decodes."""
        shape = (self.matrices * self.groups, self.tile_out, GROUP // 2)
        return [plgpu().SMEM(shape, jnp.bfloat16, transforms=swizzled(GROUP // 2))] * 2


def packed_tiles(operation: str, rows: int, count: int, inputs: int, outputs: int, *, matrices: int = 1) -> PackedTiles:
    """Tiles for `count` blocks of `rows` rows in total. Raises NotImplementedError for sizes that no tile divides."""
    block = rows // count
    if block % MIN_PACKED_ROWS or block > 256:
        raise NotImplementedError(f"blocks of {block} rows are no multiple of {MIN_PACKED_ROWS} up to 256")
    all_groups = inputs // GROUP
    default = next(g for g in PACKED_GROUPS if all_groups % g == 0)
    chosen = tiles(operation, block, groups=default, steps=PACKED_STEPS)
    groups = default if all_groups % chosen["groups"] else chosen["groups"]
    tile_out = dividing(outputs, (PACKED_TILE_OUT,), "outputs")
    if groups * GROUP < 64:
        raise NotImplementedError(f"{inputs} inputs are no multiple of 64")
    steps = all_groups // groups
    return PackedTiles(block, tile_out, groups, steps, min(chosen["steps"], steps), matrices)


def packed_products(
    sizes: PackedTiles, x: Ref, codes: Ref, scales: Ref, b: Index, n: Index, low: Ref, high: Ref
) -> tuple[Float[Array, "tile_out block"], ...]:
    """In a kernel: tile `n` of each matrix times block `b` of the rows.

    Args:
      x: rows, [even or odd, groups, rows, 16].
      codes, scales: those of one expert, [outputs, matrices * inputs / 2] and [matrices * groups, outputs].
      low, high: shared memory for decoded even and odd inputs.
    """
    mosaic = plgpu()
    block, tile_out, groups, per_group = sizes.block, sizes.tile_out, sizes.groups, GROUP // 2
    tile_in = groups * per_group

    def run(*totals: Ref) -> tuple[Array, ...]:
        def step(_: tuple[Index], even: Ref, odd: Ref, *packed: Ref) -> None:
            for m, total in enumerate(totals):
                places = range(m * groups, (m + 1) * groups)
                decoded = decoded_groups(packed[2 * m], packed[2 * m + 1], groups, low.dtype)
                for place, halves in zip(places, decoded, strict=True):
                    low[place], high[place] = halves
                mosaic.commit_smem()
                for g, place in enumerate(places):
                    mosaic.wgmma(total, low.at[place], even.at[g].T)
                    mosaic.wgmma(total, high.at[place], odd.at[g].T)
            mosaic.wgmma_wait(0)  # before `low` and `high` are written again

        def of_matrix(m: int) -> list[object]:
            first = m * sizes.steps
            return [
                mosaic.BlockSpec((tile_out, tile_in), lambda k: (n, first + k), transforms=swizzled(tile_in, 8)),
                mosaic.BlockSpec((groups, tile_out), lambda k: (first + k, n)),
            ]

        row_tile = mosaic.BlockSpec((groups, block, per_group), lambda k: (k, b, 0), transforms=swizzled(per_group))
        pipeline = mosaic.emit_pipeline(
            step,
            grid=(sizes.steps,),
            in_specs=[row_tile, row_tile, *(spec for m in range(sizes.matrices) for spec in of_matrix(m))],
            max_concurrent_steps=sizes.ring,
        )
        pipeline(x.at[0], x.at[1], *[codes, scales] * sizes.matrices)
        return tuple(total[...] for total in totals)

    return pl.run_scoped(run, *[mosaic.ACC((tile_out, block))] * sizes.matrices)


def even_and_odd(rows: Sorted) -> Halves:
    """Rows as `packed_products` takes them."""
    return rows.reshape(len(rows), -1, GROUP // 2, 2).transpose(3, 1, 0, 2)


def packed_matmul(
    halves: Halves, weights: MXFP4, expert: BlockExperts, used: IntScalar, *, interpret: bool = False
) -> Sorted:
    """`block_matmul` of rows as `even_and_odd` returns them."""
    _, inputs, outputs = weights.shape
    count, padded, dtype = len(expert), halves.shape[2], halves.dtype
    sizes = packed_tiles("grouped_matmul.mosaic_gpu.packed", padded, count, inputs, outputs)
    block, tile_out = sizes.block, sizes.tile_out

    def kernel(
        experts_of: Ref, num_used: Ref, x: Ref, codes: Ref, scales: Ref, out: Ref, tile: Ref, low: Ref, high: Ref
    ) -> None:
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            e = experts_of[b]
            (product,) = packed_products(sizes, x, codes.at[e], scales.at[e], b, n, low, high)
            tile.T[...] = product.astype(tile.dtype)
            stored((tile, out.at[pl.ds(b * block, block), pl.ds(n * tile_out, tile_out)]))

    result = plgpu().SMEM((block, tile_out), dtype, transforms=swizzled(tile_out))
    whole = jax.ShapeDtypeStruct((padded, outputs), dtype)
    grid = {"block": count, "tile": outputs // tile_out}
    call = launched(kernel, whole, grid, [result, *sizes.decoded], interpret)
    # Scales with outputs last, so that rows of a tile can be read.
    return call(expert, used[None], halves, weights.codes, weights.scales.swapaxes(1, 2))


def _packed_transposed(rows: Sorted, weights: MXFP4, expert: BlockExperts, used: IntScalar, interpret: bool) -> Sorted:
    _, inputs, outputs = weights.shape
    count = len(expert)
    block, half, per_group = len(rows) // count, inputs // 2, GROUP // 2
    if block not in BACK_GROUPS:
        raise NotImplementedError(f"blocks of {block} rows are not of {' or '.join(map(str, BACK_GROUPS))}")
    groups = next((g for g in BACK_GROUPS[block] if (inputs // GROUP) % g == 0), None)
    if groups is None:
        raise NotImplementedError(f"{inputs} inputs are no multiple of 64")
    tile_half, step_out = groups * per_group, dividing(outputs, (BACK_STEP,), "outputs")
    mosaic = plgpu()

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, codes: Ref, scales: Ref, out: Ref, *scratch: Ref) -> None:
        even_tile, odd_tile, low, high = scratch
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            def product(even: Ref, odd: Ref) -> tuple[Array, Array]:
                def step(_: tuple[Index], x_tile: Ref, code_tile: Ref, scale_tile: Ref) -> None:
                    for g, halves in enumerate(decoded_groups(code_tile, scale_tile, groups, rows.dtype)):
                        here = pl.ds(g * per_group, per_group)
                        low.at[here].T[...], high.at[here].T[...] = halves
                    mosaic.commit_smem()
                    mosaic.wgmma(even, x_tile, low.T)
                    mosaic.wgmma(odd, x_tile, high.T)
                    mosaic.wgmma_wait(0)  # before `low` and `high` are written again

                pipeline = mosaic.emit_pipeline(
                    step,
                    grid=(outputs // step_out,),
                    in_specs=[
                        mosaic.BlockSpec((block, step_out), lambda k: (b, k), transforms=swizzled(step_out)),
                        mosaic.BlockSpec((step_out, tile_half), lambda k: (k, n), transforms=swizzled(tile_half, 8)),
                        mosaic.BlockSpec((groups, step_out), lambda k: (n, k)),
                    ],
                    max_concurrent_steps=min(PACKED_STEPS, outputs // step_out),
                )
                pipeline(x, codes.at[experts_of[b]], scales.at[experts_of[b]])
                return even[...], odd[...]

            total = mosaic.ACC((block, tile_half))
            even, odd = pl.run_scoped(product, total, total)
            even_tile[...], odd_tile[...] = even.astype(rows.dtype), odd.astype(rows.dtype)
            here = pl.ds(b * block, block), pl.ds(n * tile_half, tile_half)
            stored((even_tile, out.at[0].at[here]), (odd_tile, out.at[1].at[here]))

    decoded = mosaic.SMEM((tile_half, step_out), rows.dtype, transforms=swizzled(step_out))
    result = mosaic.SMEM((block, tile_half), rows.dtype, transforms=swizzled(tile_half))
    whole = jax.ShapeDtypeStruct((2, len(rows), half), rows.dtype)
    grid = {"block": count, "tile": half // tile_half}
    call = launched(kernel, whole, grid, [result, result, decoded, decoded], interpret)
    out = call(expert, used[None], rows, weights.codes, weights.scales.swapaxes(1, 2))
    return out.transpose(1, 2, 0).reshape(len(rows), inputs)
