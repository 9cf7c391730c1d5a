"""`grouped_matmul` in plain XLA on GPUs, and for many packed experts on every device: one block of rows after another,
with its expert's matrix read in place.

Memory is proportional to the rows, whereas `lax.ragged_dot`, which XLA for GPUs expands over all experts, takes a copy
of the rows per expert, and `blocked` a copy of the matrix per block (figures: docs/kernels.md). Packed weights are
decoded one expert at a time. Blocks that hold no rows cost nothing and come out as zeros.

Left out: the speed of a grouped kernel; each block is a separate matmul, started after the one before it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.mxfp4 import Weights, as_dense, decoded_together
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, BlockExperts, Float, IntScalar, Sorted
from puzzle_jax.kernels.tiles import tiles

MIN_BLOCK, MAX_BLOCK = 8, 128


def block_rows(rows: int, num_experts: int, packed: bool = False) -> int:
    """Rows per block: the power of two at or below half the mean rows per expert, within limits."""
    half = 1 << (max(1, rows // (2 * num_experts)).bit_length() - 1)
    default = min(MAX_BLOCK, max(MIN_BLOCK, half))
    return tiles("grouped_matmul.looped", rows / num_experts, block=default)["block"]


def block_matmul(
    rows: Sorted,
    weights: Weights,
    expert: BlockExperts,
    used: IntScalar,
    *,
    transposed: bool = False,
    interpret: bool = False,
) -> Sorted:
    """See the api. Raises NotImplementedError off GPUs, where there are faster ways, unless packed weights are too
    large to be decoded together; `interpret` runs it anywhere."""
    if target_platform() != "gpu" and not interpret and decoded_together(rows.dtype, weights):
        raise NotImplementedError(f"a loop over blocks is for GPUs, but this is {target_platform()}")
    block = len(rows) // len(expert)

    def one(index: IntScalar, out: Array) -> Array:
        matrix = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert[index]), weights)
        matrix = as_dense(matrix, rows.dtype)[0]
        own = jax.lax.dynamic_slice_in_dim(rows, index * block, block)
        product = jnp.matmul(own, matrix.T if transposed else matrix, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, product.astype(rows.dtype), index * block, axis=0)

    outputs = weights.shape[1 if transposed else 2]
    return jax.lax.fori_loop(0, used, one, jnp.zeros((len(rows), outputs), rows.dtype))


def weight_gradient(
    rows: Sorted, d_out: Sorted, expert: BlockExperts, used: IntScalar, num_experts: int, dtype: jnp.dtype
) -> Float[Array, "experts inputs outputs"]:
    """Each expert's rows times the gradients of their outputs, summed in float32; zeros for experts without rows.

    Blocks must be in the order of their experts, as `layout.blocks_of` returns them.
    """
    block = len(rows) // len(expert)
    counts = jnp.zeros(num_experts, jnp.int32).at[expert].add(jnp.arange(len(expert)) < used)
    stops = jnp.cumsum(counts)

    def one_block(index: IntScalar, total: Array) -> Array:
        left, right = (jax.lax.dynamic_slice_in_dim(each, index * block, block) for each in (rows, d_out))
        return total + jnp.matmul(left.T, right, preferred_element_type=jnp.float32)

    def one_expert(index: IntScalar, out: Array) -> Array:
        nothing = jnp.zeros(out.shape[1:], jnp.float32)
        total = jax.lax.fori_loop(stops[index] - counts[index], stops[index], one_block, nothing)
        return jax.lax.dynamic_update_index_in_dim(out, total.astype(dtype), index, axis=0)

    zeros = jnp.zeros((num_experts, rows.shape[1], d_out.shape[1]), dtype)
    return jax.lax.fori_loop(0, num_experts, one_expert, zeros)
