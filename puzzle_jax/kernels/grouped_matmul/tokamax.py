"""`grouped_matmul` by tokamax's `ragged_dot` (openxla/tokamax, extra `tokamax`): its kernels on GPUs and TPUs, or XLA.

It takes any number of rows per expert; given blocks, every expert's blocks are one group. Gradients are tokamax's own;
on Hopper, that of the rows first makes a transposed copy of all weights (release 0.0.17).
Left out: packed weights, which are decoded first, and transposed matrices, of which XLA makes a copy.
"""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.grouped_matmul.ragged import rows_per_expert
from puzzle_jax.kernels.libraries import library
from puzzle_jax.kernels.mxfp4 import Weights, as_dense, check_decoded
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import BlockExperts, GroupSizes, IntScalar, Sorted


def block_matmul(
    rows: Sorted, weights: Weights, expert: BlockExperts, used: IntScalar, *, transposed: bool = False
) -> Sorted:
    """See the api. Raises NotImplementedError as `grouped_matmul` does."""
    sizes = rows_per_expert(expert, used, len(rows) // len(expert), weights.shape[0])
    return grouped_matmul(rows, weights, sizes, transposed=transposed)


def grouped_matmul(rows: Sorted, weights: Weights, group_sizes: GroupSizes, *, transposed: bool = False) -> Sorted:
    """See the api. Raises NotImplementedError if tokamax is not installed or has no kernel, and for packed weights that
    are too large to be decoded together."""
    tokamax = library("tokamax", "tokamax")
    check_decoded(rows.dtype, weights)
    dense = as_dense(weights, rows.dtype)
    dense = dense.swapaxes(1, 2) if transposed else dense
    # Its kernels neither read nor write the rows past the last group, and neither do its gradients.
    there = jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes)
    out = tokamax.ragged_dot(
        jnp.where(there, rows, 0),
        dense,
        group_sizes,
        preferred_element_type=rows.dtype,
        implementation="xla" if target_platform() == "cpu" else "mosaic",
    )
    return jnp.where(there, out, 0)
