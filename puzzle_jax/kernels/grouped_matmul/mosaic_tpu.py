"""`grouped_matmul` on TPUs: a grid step per block of rows, tile of outputs and tile of inputs.

The expert of every block is prefetched, so that the pipeline fetches the right tile of weights ahead of time. Blocks
without rows request the tiles that are loaded already and compute nothing. Packed weights are decoded in the kernel, so
their bytes cross memory once: codes are stored two to a byte, input 2j low and input 2j + 1 high, so even and odd
inputs are two products and nothing is interleaved in the kernel; a small exact product spreads each scale over its 16
bytes.

Left out: skipping the rows that pad a block, which are computed like others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from puzzle_jax.kernels.grouped_matmul.layout import mean_share
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights, code_values, scale_values
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, BlockExperts, Float, Index, IntScalar, Matrices, Ref, Sorted
from puzzle_jax.kernels.tiles import tiles

LANES = 128
TILE_IN, TILE_OUT = 1024, 512
STEP_BACK = 256  # outputs per step of the transposed product of packed weights
MAX_WHOLE = 4096


def inputs_tile(size: int, unit: int, most: int = TILE_IN) -> int:
    """Inputs per step: a multiple of `unit` up to `most` that divides them, or else all of them.

    A tile that reached past the end would add whatever is there. Raises NotImplementedError if all are too many.
    """
    fitting = [tile for tile in range(unit, most + 1, unit) if size % tile == 0]
    if not fitting and size > MAX_WHOLE:
        raise NotImplementedError(f"{size} inputs are too many for one tile, and no multiple of {unit}")
    return max(fitting, default=size)


def outputs_tile(size: int, most: int = TILE_OUT) -> int:
    """Outputs per step; only the part of the last tile that exists is written."""
    return min(most, -(-size // LANES) * LANES)


def _tiles(form: str, block: int) -> tuple[int, int]:
    """The most inputs and outputs per step for blocks of so many rows."""
    chosen = tiles(f"grouped_matmul.mosaic_tpu.{form}", block, tile_in=TILE_IN, tile_out=TILE_OUT)
    return chosen["tile_in"], chosen["tile_out"]


def block_rows(rows: int, num_experts: int, packed: bool) -> int:
    """Rows per block, from two tiles of registers to 512."""
    return mean_share("mosaic_tpu", rows, num_experts, packed, least=16, most=512)


def block_matmul(
    rows: Sorted,
    weights: Weights,
    expert: BlockExperts,
    used: IntScalar,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Sorted:
    """See the api. Raises NotImplementedError off TPUs unless interpreted, and for inputs that fit into no tile."""
    if not interpret and target_platform() != "tpu":
        raise NotImplementedError(f"for TPUs, but this is {target_platform()}")
    if isinstance(weights, MXFP4):
        packed = _packed_transposed if transposed else _packed
        return packed(rows, weights, expert, used, interpret)
    return _dense(rows, weights, expert, used, transposed, interpret)


def _dense(
    rows: Sorted, weights: Matrices, expert: BlockExperts, used: IntScalar, transposed: bool, interpret: bool
) -> Sorted:
    inputs, outputs = weights.shape[:0:-1] if transposed else weights.shape[1:]
    most_in, most_out = _tiles("dense", len(rows) // len(expert))
    tile_in, tile_out = inputs_tile(inputs, LANES, most_in), outputs_tile(outputs, most_out)
    contract = (((1,), (1 if transposed else 0,)), ((), ()))

    def product(tile: Index, step: Index, x: Ref, w: Ref) -> Float[Array, "block tile_out"]:
        return lax.dot_general(x[...], w[0], contract, preferred_element_type=jnp.float32)

    shape = (1, tile_out, tile_in) if transposed else (1, tile_in, tile_out)
    at = (lambda e, n, k: (e, n, k)) if transposed else (lambda e, n, k: (e, k, n))
    return _call(
        product,
        [rows],
        tile_in,
        [(weights, shape, at)],
        (expert, used),
        inputs // tile_in,
        tile_out,
        outputs,
        interpret,
    )


def _packed(rows: Sorted, weights: MXFP4, expert: BlockExperts, used: IntScalar, interpret: bool) -> Sorted:
    _, inputs, outputs = weights.shape
    most_in, most_out = _tiles("packed", len(rows) // len(expert))
    tile_in, tile_out = inputs_tile(inputs, 2 * LANES, most_in), outputs_tile(outputs, most_out)
    half, groups = tile_in // 2, inputs // GROUP
    even, odd = rows[:, 0::2], rows[:, 1::2]
    contract = (((1,), (1,)), ((), ()))

    def product(tile: Index, step: Index, x_even: Ref, x_odd: Ref, w: Ref, s: Ref) -> Float[Array, "block tile_out"]:
        scales = _spread(scale_values(s[0]), step * (tile_in // GROUP), half)
        byte = w[0].astype(jnp.int32)
        total = jnp.zeros((), jnp.float32)
        for x, code in ((x_even, byte & 0xF), (x_odd, byte >> 4)):
            decoded = (code_values(code) * scales).astype(x.dtype)
            total = total + lax.dot_general(x[...], decoded, contract, preferred_element_type=jnp.float32)
        return total

    tiles = [
        (weights.codes, (1, tile_out, half), lambda e, n, k: (e, n, k)),
        # All groups of an output: a tile of a few would not fill whole registers.
        (weights.scales, (1, tile_out, groups), lambda e, n, k: (e, n, 0)),
    ]
    return _call(product, [even, odd], half, tiles, (expert, used), inputs // tile_in, tile_out, outputs, interpret)


def _packed_transposed(rows: Sorted, weights: MXFP4, expert: BlockExperts, used: IntScalar, interpret: bool) -> Sorted:
    """Even and odd inputs are separate sums, over steps of outputs."""
    _, inputs, outputs = weights.shape
    half, groups = inputs // 2, inputs // GROUP
    tile_half, tile_out = inputs_tile(half, LANES, TILE_OUT), min(STEP_BACK, -(-outputs // LANES) * LANES)
    steps = pl.cdiv(outputs, tile_out)
    padded = jnp.pad(rows, ((0, 0), (0, steps * tile_out - outputs)))

    def product(tile: Index, step: Index, x: Ref, w: Ref, s: Ref) -> Float[Array, "2 block tile_half"]:
        # Past the last output the tiles are undefined: any code decodes to a number, but a scale need not.
        there = lax.broadcasted_iota(jnp.int32, (tile_out, groups), 0) < outputs - step * tile_out
        values = jnp.where(there, scale_values(s[0]), 0.0)
        scales = _spread(values, tile * (tile_half // (GROUP // 2)), tile_half)
        byte = w[0].astype(jnp.int32)
        both = [(code_values(code) * scales).astype(x.dtype) for code in (byte & 0xF, byte >> 4)]
        return jnp.stack([jnp.dot(x[...], decoded, preferred_element_type=jnp.float32) for decoded in both])

    tiles = [
        (weights.codes, (1, tile_out, tile_half), lambda e, n, k: (e, k, n)),
        (weights.scales, (1, tile_out, groups), lambda e, n, k: (e, k, 0)),
    ]
    out = _call(product, [padded], tile_out, tiles, (expert, used), steps, tile_half, half, interpret, parts=(2,))
    return out.transpose(1, 2, 0).reshape(len(rows), inputs)


def _spread(scales: Float[Array, "outputs groups"], first: Index, half: int) -> Float[Array, "outputs half"]:
    """Spreads each scale over its 16 bytes, for `half` bytes from group `first` on; exact, as each sum has one term."""
    shape = (scales.shape[1], half)
    group = lax.broadcasted_iota(jnp.int32, shape, 0) - first
    own = (lax.broadcasted_iota(jnp.int32, shape, 1) >> 4 == group).astype(jnp.float32)
    return jnp.matmul(scales, own, precision=lax.Precision.HIGHEST)


Place = Callable[[Index, Index, Index], tuple[Index, ...]]


def _call(
    product: Callable[..., Float[Array, "block tile_out"]],
    rows: Sequence[Float[Array, "padded _"]],
    tile_rows: int,
    weights: Sequence[tuple[Array, tuple[int, ...], Place]],
    blocks: tuple[BlockExperts, IntScalar],
    steps: int,
    tile_out: int,
    outputs: int,
    interpret: bool,
    parts: tuple[int, ...] = (),
) -> Float[Array, "*parts padded outputs"]:
    """Sums `product(tile of outputs, step, *tiles)` over the inputs.

    Args:
      rows: arrays of the same rows, cut into tiles of `tile_rows` columns.
      weights: arrays, each with the shape of a tile and its place by expert, tile of outputs and tile of inputs.
      blocks: the expert of each block, and how many blocks are used.
      steps: number of tiles of inputs.
      parts: number of sums that a product makes at once, its leading axis.
    """
    count = len(blocks[0])
    block, tiles_out = len(rows[0]) // count, pl.cdiv(outputs, tile_out)
    lead = (0,) * len(parts)

    def at(b: Index, n: Index, k: Index, expert: Ref, used: Ref) -> tuple[Array, Array, Array]:
        """The block and tiles to load: past the used blocks, those that are loaded already."""
        there = b < used[0]
        return (
            jnp.where(there, b, jnp.maximum(used[0] - 1, 0)),
            jnp.where(there, n, tiles_out - 1),
            jnp.where(there, k, steps - 1),
        )

    def row_tile(b: Index, n: Index, k: Index, expert: Ref, used: Ref) -> tuple[Index, ...]:
        b, _, k = at(b, n, k, expert, used)
        return b, k

    def weight_tile(place: Place) -> Callable[..., tuple[Index, ...]]:
        def index(b: Index, n: Index, k: Index, expert: Ref, used: Ref) -> tuple[Index, ...]:
            b, n, k = at(b, n, k, expert, used)
            return place(expert[b], n, k)

        return index

    def kernel(expert: Ref, used: Ref, *refs: Ref) -> None:
        *tiles, out, total = refs
        n, k = pl.program_id(1), pl.program_id(2)

        @pl.when(pl.program_id(0) < used[0])
        def _() -> None:
            @pl.when(k == 0)
            def _() -> None:
                total[...] = jnp.zeros_like(total)

            total[...] += product(n, k, *tiles)

            @pl.when(k == steps - 1)
            def _() -> None:
                out[...] = total[...].astype(out.dtype)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(count, tiles_out, steps),
        in_specs=[
            *(pl.BlockSpec((block, tile_rows), row_tile) for _ in rows),
            *(pl.BlockSpec(shape, weight_tile(place)) for _, shape, place in weights),
        ],
        out_specs=pl.BlockSpec((*parts, block, tile_out), lambda b, n, k, expert, used: (*lead, b, n)),
        scratch_shapes=[pltpu.VMEM((*parts, block, tile_out), jnp.float32)],
    )
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((*parts, len(rows[0]), outputs), rows[0].dtype),
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, weights, count, prod(parts) * outputs, tiles_out),
        interpret=interpret,
    )
    return call(blocks[0], blocks[1][None], *rows, *(array for array, _, _ in weights))


def _cost(
    rows: Sequence[Float[Array, "padded _"]],
    weights: Sequence[tuple[Array, tuple[int, ...], Place]],
    count: int,
    outputs: int,
    tiles_out: int,
) -> pl.CostEstimate:
    """The cost with all blocks in use: each reads its expert's matrix once, and its rows once per tile of outputs."""
    inputs = sum(x.shape[1] for x in rows)
    per_expert = sum(array.nbytes // len(array) for array, _, _ in weights)
    row_bytes = sum(x.nbytes for x in rows)
    return pl.CostEstimate(
        flops=2 * len(rows[0]) * inputs * outputs,
        bytes_accessed=count * per_expert + tiles_out * row_bytes + len(rows[0]) * outputs * rows[0].dtype.itemsize,
        transcendentals=0,
    )
