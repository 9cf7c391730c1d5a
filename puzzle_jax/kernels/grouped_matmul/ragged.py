"""`grouped_matmul` by JAX's own `lax.ragged_dot`, which is good on TPUs, with one pass over dense weights.

Given blocks, it takes every expert's blocks as one group, so small blocks waste little.
Left out: CPUs and GPUs, where XLA expands it over all experts (its fused form for GPUs is behind a flag, and cannot
return float32), and packed weights, which are decoded first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.mxfp4 import Weights, as_dense, check_decoded
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, BlockExperts, GroupSizes, Int, IntScalar, Sorted

BLOCK = 8


def block_rows(rows: int, num_experts: int, packed: bool = False) -> int:
    """Rows per block."""
    return BLOCK


def block_matmul(
    rows: Sorted, weights: Weights, expert: BlockExperts, used: IntScalar, *, transposed: bool = False
) -> Sorted:
    """See the api. Raises NotImplementedError off TPUs."""
    sizes = rows_per_expert(expert, used, len(rows) // len(expert), weights.shape[0])
    return grouped_matmul(rows, weights, sizes, transposed=transposed)


def rows_per_expert(expert: BlockExperts, used: IntScalar, block: int, num_experts: int) -> Int[Array, "experts"]:
    """Rows of each expert's blocks, padding included."""
    return jnp.zeros(num_experts, jnp.int32).at[expert].add(jnp.where(jnp.arange(len(expert)) < used, block, 0))


def grouped_matmul(rows: Sorted, weights: Weights, group_sizes: GroupSizes, *, transposed: bool = False) -> Sorted:
    """See the api. Raises NotImplementedError off TPUs, and for packed weights too large to be decoded together."""
    if target_platform() != "tpu":
        raise NotImplementedError("XLA expands it over all experts on CPUs and GPUs")
    check_decoded(rows.dtype, weights)
    dense = as_dense(weights, rows.dtype)
    dense = dense.swapaxes(1, 2) if transposed else dense
    out = jax.lax.ragged_dot(rows, dense, group_sizes, preferred_element_type=jnp.float32)
    # Not every device writes the rows past the last group.
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), out, 0).astype(rows.dtype)
