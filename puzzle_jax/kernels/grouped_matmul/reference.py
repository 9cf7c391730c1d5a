"""Reference for `grouped_matmul`: one expert after another on all rows, masked."""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.mxfp4 import Weights, as_dense
from puzzle_jax.kernels.shapes import GroupSizes, Sorted


def grouped_matmul(rows: Sorted, weights: Weights, group_sizes: GroupSizes, *, transposed: bool = False) -> Sorted:
    """See the api. Rows past the last group are zeros."""
    dense = as_dense(weights, rows.dtype)
    if transposed:
        dense = dense.swapaxes(1, 2)
    end = jnp.cumsum(group_sizes)
    row = jnp.arange(len(rows))[:, None]
    out = jnp.zeros((len(rows), dense.shape[2]), jnp.float32)
    for expert in range(len(group_sizes)):
        own = (row >= end[expert] - group_sizes[expert]) & (row < end[expert])
        out = out + jnp.where(own, jnp.matmul(rows, dense[expert], preferred_element_type=jnp.float32), 0.0)
    return out.astype(rows.dtype)
