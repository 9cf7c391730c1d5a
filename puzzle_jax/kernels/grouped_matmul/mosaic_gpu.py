"""`grouped_matmul` on Hopper GPUs, in Pallas' Mosaic GPU: a grid step per block of rows and tile of outputs.

Dense: the block of rows is the left side of wgmma, the expert's tile the right one; both come by TMA in a pipeline.

Packed (MXFP4): the weights are the left side and the rows the right one, so few rows cost few columns; 64 outputs are
the least that wgmma works on, 8 rows the least. Packed bytes come by TMA, are decoded in registers and go to shared
memory as bfloat16. They cross global memory once. Codes lie two to a byte, input 2j low and input 2j + 1 high: even and
odd inputs are products of their own and nothing is interleaved. A wgmma takes 16 of either, which is a group of 32
inputs with one scale per output. Transposed, for the gradient of the rows, the rows are the left side again; even and
odd inputs are sums of their own, which XLA interleaves.

Left out: clusters with multicast, a persistent grid, stores of single rows (blocks are padded), and weights decoded
straight into the registers that wgmma reads, which the interpreter of this backend cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator

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


def block_rows(rows: int, num_experts: int, packed: bool) -> int:
    """Rows per block, from the least that wgmma takes to 128.

    Packed weights are decoded once per block, so few blocks are worth more than little padding.
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
    """See the api. Raises NotImplementedError where this is no Hopper GPU (unless interpreted), below JAX 0.11.2, for
    other types than bfloat16, and for sizes that no tile divides."""
    hopper_only(interpret)
    if rows.dtype != jnp.bfloat16:
        raise NotImplementedError(f"for bfloat16, but rows are {rows.dtype}")
    if isinstance(weights, MXFP4):
        packed = _packed_transposed if transposed else _packed
        return packed(rows, weights, expert, used, interpret)
    return _dense(rows, weights.astype(rows.dtype), expert, used, transposed, interpret)


def _dividing(size: int, tiles: tuple[int, ...], what: str) -> int:
    for tile in tiles:
        if size % tile == 0:
            return tile
    raise NotImplementedError(f"{size} {what} are no multiple of {tiles[-1]}")


def _decoded(codes: Ref, scales: Ref, groups: int, dtype: jnp.dtype) -> Iterator[tuple[Array, Array]]:
    """The even and the odd inputs of each group of a tile."""
    pairs = codes[...].astype(jnp.int32)
    for g in range(groups):
        pair = pairs[:, g * GROUP // 2 : (g + 1) * GROUP // 2]
        scale = lax.broadcast_in_dim(scale_values(scales[g]), pair.shape, (0,))
        yield (code_values(pair & 0xF) * scale).astype(dtype), (code_values(pair >> 4) * scale).astype(dtype)


def _dense(
    rows: Sorted, weights: Matrices, expert: BlockExperts, used: IntScalar, transposed: bool, interpret: bool
) -> Sorted:
    inputs, outputs = weights.shape[:0:-1] if transposed else weights.shape[1:]
    count = len(expert)
    block = len(rows) // count
    if block % MIN_DENSE_ROWS:
        raise NotImplementedError(f"blocks of {block} rows are no multiple of {MIN_DENSE_ROWS}")
    tile_in = _dividing(inputs, (DENSE_TILE_IN,), "inputs")
    default = _dividing(outputs, DENSE_TILE_OUT, "outputs")
    chosen = tiles("grouped_matmul.mosaic_gpu.dense", block, tile_out=default, steps=DENSE_STEPS)
    tile_out = default if outputs % chosen["tile_out"] else chosen["tile_out"]
    steps = inputs // tile_in
    delay = min(1, steps - 1)  # a tile is still read by the wgmma of the step before
    mosaic = plgpu()

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, w: Ref, out: Ref, tile: Ref) -> None:
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            def product(total: Ref) -> Float[Array, "block tile_out"]:
                def step(_: tuple[Index], x_tile: Ref, w_tile: Ref) -> None:
                    mosaic.wgmma(total, x_tile, w_tile.T if transposed else w_tile)

                weight_tile = (tile_out, tile_in) if transposed else (tile_in, tile_out)
                pipeline = mosaic.emit_pipeline(
                    step,
                    grid=(steps,),
                    in_specs=[
                        mosaic.BlockSpec(
                            (block, tile_in), lambda k: (b, k), transforms=swizzled(tile_in), delay_release=delay
                        ),
                        mosaic.BlockSpec(
                            weight_tile,
                            (lambda k: (n, k)) if transposed else (lambda k: (k, n)),
                            transforms=swizzled(weight_tile[1]),
                            delay_release=delay,
                        ),
                    ],
                    max_concurrent_steps=min(chosen["steps"], steps),
                )
                pipeline(x, w.at[experts_of[b]])
                return total[...]

            tile[...] = pl.run_scoped(product, mosaic.ACC((block, tile_out))).astype(tile.dtype)
            stored((tile, out.at[pl.ds(b * block, block), pl.ds(n * tile_out, tile_out)]))

    result = mosaic.SMEM((block, tile_out), rows.dtype, transforms=swizzled(tile_out))
    whole = jax.ShapeDtypeStruct((len(rows), outputs), rows.dtype)
    call = launched(kernel, whole, {"block": count, "tile": outputs // tile_out}, [result], interpret)
    return call(expert, used[None], rows, weights)


def _packed(rows: Sorted, weights: MXFP4, expert: BlockExperts, used: IntScalar, interpret: bool) -> Sorted:
    _, inputs, outputs = weights.shape
    count = len(expert)
    block, half, per_group = len(rows) // count, inputs // 2, GROUP // 2
    if block % MIN_PACKED_ROWS or block > 256:
        raise NotImplementedError(f"blocks of {block} rows are no multiple of {MIN_PACKED_ROWS} up to 256")
    default = next(g for g in PACKED_GROUPS if (inputs // GROUP) % g == 0)
    chosen = tiles("grouped_matmul.mosaic_gpu.packed", block, groups=default, steps=PACKED_STEPS)
    groups = default if (inputs // GROUP) % chosen["groups"] else chosen["groups"]
    tile_out, tile_in = _dividing(outputs, (PACKED_TILE_OUT,), "outputs"), groups * per_group
    if tile_in < 32:
        raise NotImplementedError(f"{inputs} inputs are no multiple of 64")
    mosaic = plgpu()

    def kernel(
        experts_of: Ref, num_used: Ref, x: Ref, codes: Ref, scales: Ref, out: Ref, tile: Ref, low: Ref, high: Ref
    ) -> None:
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            def product(total: Ref) -> Float[Array, "tile_out block"]:
                def step(_: tuple[Index], code_tile: Ref, scale_tile: Ref, even: Ref, odd: Ref) -> None:
                    for g, halves in enumerate(_decoded(code_tile, scale_tile, groups, rows.dtype)):
                        low[g], high[g] = halves
                    mosaic.commit_smem()
                    for g in range(groups):
                        mosaic.wgmma(total, low.at[g], even.at[g].T)
                        mosaic.wgmma(total, high.at[g], odd.at[g].T)
                    mosaic.wgmma_wait(0)  # before `low` and `high` are written again

                row_tile = mosaic.BlockSpec(
                    (groups, block, per_group), lambda k: (k, b, 0), transforms=swizzled(per_group)
                )
                pipeline = mosaic.emit_pipeline(
                    step,
                    grid=(half // tile_in,),
                    in_specs=[
                        mosaic.BlockSpec((tile_out, tile_in), lambda k: (n, k), transforms=swizzled(tile_in, 8)),
                        mosaic.BlockSpec((groups, tile_out), lambda k: (k, n)),
                        row_tile,
                        row_tile,
                    ],
                    max_concurrent_steps=min(chosen["steps"], half // tile_in),
                )
                pipeline(codes.at[experts_of[b]], scales.at[experts_of[b]], x.at[0], x.at[1])
                return total[...]

            tile.T[...] = pl.run_scoped(product, mosaic.ACC((tile_out, block))).astype(tile.dtype)
            stored((tile, out.at[pl.ds(b * block, block), pl.ds(n * tile_out, tile_out)]))

    decoded = mosaic.SMEM((groups, tile_out, per_group), rows.dtype, transforms=swizzled(per_group))
    result = mosaic.SMEM((block, tile_out), rows.dtype, transforms=swizzled(tile_out))
    whole = jax.ShapeDtypeStruct((len(rows), outputs), rows.dtype)
    grid = {"block": count, "tile": outputs // tile_out}
    call = launched(kernel, whole, grid, [result, decoded, decoded], interpret)
    # [even or odd, groups, rows, 16], and scales with outputs last, which is what a row of a tile can be read from.
    split = rows.reshape(len(rows), inputs // GROUP, per_group, 2).transpose(3, 1, 0, 2)
    return call(expert, used[None], split, weights.codes, weights.scales.swapaxes(1, 2))


def _packed_transposed(rows: Sorted, weights: MXFP4, expert: BlockExperts, used: IntScalar, interpret: bool) -> Sorted:
    _, inputs, outputs = weights.shape
    count = len(expert)
    block, half, per_group = len(rows) // count, inputs // 2, GROUP // 2
    if block not in BACK_GROUPS:
        raise NotImplementedError(f"blocks of {block} rows are not of {' or '.join(map(str, BACK_GROUPS))}")
    groups = next((g for g in BACK_GROUPS[block] if (inputs // GROUP) % g == 0), None)
    if groups is None:
        raise NotImplementedError(f"{inputs} inputs are no multiple of 64")
    tile_half, step_out = groups * per_group, _dividing(outputs, (BACK_STEP,), "outputs")
    mosaic = plgpu()

    def kernel(experts_of: Ref, num_used: Ref, x: Ref, codes: Ref, scales: Ref, out: Ref, *scratch: Ref) -> None:
        even_tile, odd_tile, low, high = scratch
        b, n = lax.axis_index("block"), lax.axis_index("tile")

        @pl.when(b < num_used[0])
        def _() -> None:
            def product(even: Ref, odd: Ref) -> tuple[Array, Array]:
                def step(_: tuple[Index], x_tile: Ref, code_tile: Ref, scale_tile: Ref) -> None:
                    for g, halves in enumerate(_decoded(code_tile, scale_tile, groups, rows.dtype)):
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
