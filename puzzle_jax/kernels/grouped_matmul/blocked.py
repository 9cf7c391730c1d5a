"""`grouped_matmul` in plain XLA: blocks of rows times their experts' matrices, which are gathered block by block.

It runs on every device, is differentiable, and is the fast way on CPUs, where `lax.ragged_dot` is dense over all
experts.
Left out: decoding inside the product; packed weights are decoded first.
"""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.grouped_matmul.layout import half_share
from puzzle_jax.kernels.mxfp4 import Weights, as_dense, check_decoded
from puzzle_jax.kernels.shapes import BlockExperts, IntScalar, Sorted
from puzzle_jax.kernels.tiles import tiles

MIN_BLOCK, MAX_BLOCK = 4, 256


def block_rows(rows: int, num_experts: int, packed: bool = False) -> int:
    """Rows per block."""
    default = half_share(rows, num_experts, MIN_BLOCK, MAX_BLOCK)
    return tiles("grouped_matmul.blocked", rows / num_experts, block=default)["block"]


def block_matmul(
    rows: Sorted, weights: Weights, expert: BlockExperts, used: IntScalar, *, transposed: bool = False
) -> Sorted:
    """See the api. Raises NotImplementedError for packed weights that are too large to be decoded together."""
    check_decoded(rows.dtype, weights)
    dense = as_dense(weights, rows.dtype)[expert]
    subscripts = "nbi,noi->nbo" if transposed else "nbi,nio->nbo"
    each = rows.reshape(len(expert), -1, rows.shape[1])
    out = jnp.einsum(subscripts, each, dense, preferred_element_type=jnp.float32)
    return out.reshape(len(rows), -1).astype(rows.dtype)
