"""Rows sorted by expert, each times its expert's matrix; weights are dense or packed (MXFP4).

Kernels take rows in blocks of one expert each (`layout`): padding a group to whole blocks costs less than tiles that
two experts share, and work stays proportional to the rows. Implementations: `mosaic_gpu` for Hopper and `mosaic_tpu`,
where they have passed their self-check; `ragged_dot` on TPUs, `looped` on GPUs and `blocked` on CPUs, the last two in
plain XLA; `reference`; and, only by name, `tokamax`. Packed weights that are too large to be decoded together use
`looped` everywhere.

Gradients of the kernels and of `looped`: for the rows, the same implementation with the matrices transposed or, if it
has no such product, with packed ones decoded first, or else XLA; for dense weights, `lax.ragged_dot_general` on TPUs,
and a loop over blocks elsewhere. Packed weights have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.grouped_matmul import blocked, looped, mosaic_gpu, mosaic_tpu, ragged, reference, tokamax
from puzzle_jax.kernels.grouped_matmul.layout import Blocks, blocks_of
from puzzle_jax.kernels.grouped_matmul.trial import trial
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights, decode
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, BlockExperts, Bool, Float, GroupSizes, IntScalar, Matrices, Sorted

__all__ = [
    "BLOCK_IMPLEMENTATIONS",
    "BLOCK_ROWS",
    "IMPLEMENTATIONS",
    "Blocks",
    "block_matmul",
    "blocks_of",
    "grouped_matmul",
    "in_use_rows",
]

Saved = tuple[Array, tuple[Array, ...], Array, Array]


def _differentiable(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """Makes a kernel for blocks differentiable."""

    # Packed weights are passed as two arrays: JAX builds trees whose leaves are not arrays while it differentiates.
    def call(
        rows: Array, parts: tuple[Array, ...], expert: Array, used: Array, transposed: bool, interpret: bool
    ) -> Sorted:
        weights = parts[0] if len(parts) == 1 else MXFP4(*parts)
        return kernel(rows, weights, expert, used, transposed=transposed, interpret=interpret)

    def save(
        rows: Array, parts: tuple[Array, ...], expert: Array, used: Array, transposed: bool, interpret: bool
    ) -> tuple[Array, Saved]:
        return call(rows, parts, expert, used, transposed, interpret), (rows, parts, expert, used)

    def backward(transposed: bool, interpret: bool, saved: Saved, d_out: Array) -> tuple[Array, object, None, None]:
        rows, parts, expert, used = saved
        first, *scales = parts

        def by_kernel(parts: tuple[Array, ...]) -> Array:
            return call(d_out, parts, expert, used, not transposed, interpret)

        def by_xla(multiply: Callable[..., Array]) -> Array:
            return multiply(d_out, _dense(parts, rows.dtype), expert, used, transposed=not transposed)

        ways = {
            "the kernel": lambda: by_kernel(parts),
            "the kernel, decoded": lambda: by_kernel((_dense(parts, rows.dtype),)),
            "ragged_dot": lambda: by_xla(ragged.block_matmul),
            "looped": lambda: by_xla(looped.block_matmul),
            "blocked": lambda: by_xla(blocked.block_matmul),
        }
        d_rows = dispatch("the rows' gradient of block_matmul", ways, None)
        # Kernels do not write blocks without rows.
        d_rows = jnp.where(in_use_rows(expert, used, len(rows)), d_rows, 0)
        d_parts = (None, None) if scales else (_d_weights(rows, d_out, first, expert, used, transposed),)
        return d_rows, d_parts, None, None

    run = jax.custom_vjp(call, nondiff_argnums=(4, 5))
    run.defvjp(save, backward)

    def with_gradients(
        rows: Array, weights: Weights, expert: Array, used: Array, *, transposed: bool = False, interpret: bool = False
    ) -> Sorted:
        parts = (weights.codes, weights.scales) if isinstance(weights, MXFP4) else (weights,)
        return run(rows, parts, expert, used, transposed, interpret)

    return with_gradients


def _dense(parts: tuple[Array, ...], dtype: jnp.dtype) -> Matrices:
    if len(parts) == 1:
        return parts[0]
    codes, scales = parts
    return decode(MXFP4(codes, scales), dtype)


def in_use_rows(expert: BlockExperts, used: IntScalar, padded: int) -> Bool[Array, "padded 1"]:
    """The mask of padded rows that are in used blocks; results for the others are undefined."""
    return (jnp.arange(padded) < used * (padded // len(expert)))[:, None]


def _d_weights(
    rows: Array, d_out: Array, weights: Array, expert: Array, used: Array, transposed: bool
) -> Float[Array, "experts inputs outputs"]:
    """The gradient of dense weights: each expert's rows times the gradients of their outputs."""
    if target_platform() != "tpu":
        left, right = (d_out, rows) if transposed else (rows, d_out)
        return looped.weight_gradient(left, right, expert, used, len(weights), weights.dtype)
    sizes = ragged.rows_per_expert(expert, used, len(rows) // len(expert), len(weights))
    in_use = in_use_rows(expert, used, len(rows))
    left, right = (jnp.where(in_use, x, 0) for x in ((d_out, rows) if transposed else (rows, d_out)))
    dimensions = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    found = lax.ragged_dot_general(left, right, sizes, dimensions, preferred_element_type=jnp.float32)
    return found.astype(weights.dtype)


BLOCK_IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "tokamax": tokamax.block_matmul,
    "ragged_dot": ragged.block_matmul,
    "looped": _differentiable(looped.block_matmul),
    "blocked": blocked.block_matmul,
    "mosaic_gpu": _differentiable(mosaic_gpu.block_matmul),
    "mosaic_tpu": _differentiable(mosaic_tpu.block_matmul),
}

BLOCK_ROWS: dict[str, Callable[..., int]] = {
    "tokamax": ragged.block_rows,
    "ragged_dot": ragged.block_rows,
    "looped": looped.block_rows,
    "blocked": blocked.block_rows,
    "mosaic_gpu": mosaic_gpu.block_rows,
    "mosaic_tpu": mosaic_tpu.block_rows,
}
"""Rows per block that suit each, as functions of rows, number of experts, and whether weights are packed."""


def block_matmul(
    rows: Float[Array, "padded columns"],
    weights: Weights,
    expert: BlockExperts,
    used: IntScalar,
    *,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "padded outputs"]:
    """Rows in blocks of one expert each, times their experts' matrices.

    Args:
      rows: `padded / blocks` rows per block.
      weights: matrices of all experts; with `transposed` their outputs and inputs are swapped.
      expert: expert of each block.
      used: number of blocks that hold rows, which come first; results for the others are undefined.
      implementation: pins one of `BLOCK_IMPLEMENTATIONS`.

    Raises ValueError for shapes that do not fit, NotImplementedError if no implementation accepts the arguments.
    """
    _check(rows, weights, transposed)
    if len(rows) % len(expert):
        raise ValueError(f"{len(rows)} rows are no whole blocks: expert names {len(expert)} of them")
    return dispatch(
        "block_matmul", BLOCK_IMPLEMENTATIONS, implementation, rows, weights, expert, used, transposed=transposed
    )


def _in_blocks(name: str) -> Callable[..., Array]:
    def run(rows: Array, weights: Weights, group_sizes: Array, *, transposed: bool = False) -> Array:
        packed = isinstance(weights, MXFP4)
        blocks = blocks_of(group_sizes, len(rows), BLOCK_ROWS[name](len(rows), len(group_sizes), packed))
        padded = jnp.take(rows, blocks.source, axis=0, mode="fill", fill_value=0)
        out = BLOCK_IMPLEMENTATIONS[name](padded, weights, blocks.expert, blocks.used, transposed=transposed)
        return jnp.take(out, blocks.slot, axis=0, mode="fill", fill_value=0)

    return run


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "mosaic_gpu": _in_blocks("mosaic_gpu"),
    "mosaic_tpu": _in_blocks("mosaic_tpu"),
    "tokamax": tokamax.grouped_matmul,
    "ragged_dot": ragged.grouped_matmul,
    "looped": _in_blocks("looped"),
    "blocked": _in_blocks("blocked"),
    "reference": reference.grouped_matmul,
}


def grouped_matmul(
    rows: Float[Array, "rows columns"],
    weights: Weights,
    group_sizes: GroupSizes,
    *,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "rows outputs"]:
    """Rows sorted by expert, times their experts' matrices.

    Args:
      rows: the first `group_sizes[0]` are expert 0's, and so on; those past the sum come out as zeros.
      weights: matrices of all experts; with `transposed` their outputs and inputs are swapped.
      group_sizes: rows of every expert, which may be 0.
      implementation: pins one of `IMPLEMENTATIONS`.

    Differentiable in `rows` and dense weights. Raises ValueError, before anything runs, for shapes that do not fit and,
    if the sizes are known, for sizes below zero or with a sum above the number of rows.
    """
    _check(rows, weights, transposed)
    experts = weights.shape[0]
    if group_sizes.shape != (experts,):
        raise ValueError(
            f"group_sizes has shape {group_sizes.shape}, but weights of shape {weights.shape} need ({experts},)"
        )
    if not isinstance(group_sizes, Tracer):
        sizes = np.asarray(group_sizes)
        if sizes.min(initial=0) < 0 or sizes.sum() > len(rows):
            raise ValueError(
                f"group_sizes are {sizes.min()} at least and {sizes.sum()} in sum, but rows are {len(rows)}"
            )
    if not len(rows):
        return jnp.zeros((0, weights.shape[1 if transposed else 2]), rows.dtype)
    return dispatch(
        "grouped_matmul",
        IMPLEMENTATIONS,
        implementation,
        rows,
        weights,
        group_sizes,
        transposed=transposed,
        trial=partial(trial, rows, weights, transposed, grouped_matmul),
    )


def _check(rows: Array, weights: Weights, transposed: bool) -> None:
    checks.floating(rows=rows)
    if isinstance(weights, MXFP4):
        experts, outputs, groups = weights.scales.shape
        codes = {"weights.codes": (weights.codes, (experts, outputs, groups * GROUP // 2))}
        checks.shapes(f"weights.scales of shape {weights.scales.shape}", codes)
    else:
        checks.floating(weights=weights)
    inputs = weights.shape[2 if transposed else 1]
    if rows.ndim != 2 or rows.shape[1] != inputs:
        raise ValueError(f"rows have shape {rows.shape}, but weights of shape {weights.shape} take {inputs} inputs")
