"""`grouped_matmul` by `lax.ragged_dot`: what JAX offers. Good on GPUs and TPUs in one pass over dense weights.

Left out: CPUs, where it is dense over all experts, and packed weights, which are decoded first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels.mxfp4 import MXFP4, as_dense
from puzzle_jax.kernels.platform import target_platform


def grouped_matmul(
    rows: Float[Array, "rows inputs"],
    weights: Float[Array, "experts first second"] | MXFP4,
    group_sizes: Int[Array, "experts"],
    *,
    transposed: bool = False,
) -> Float[Array, "rows outputs"]:
    """See the api. Raises NotImplementedError on CPUs."""
    if target_platform() == "cpu":
        raise NotImplementedError("it is dense over all experts on CPUs")
    dense = as_dense(weights, rows.dtype)
    dense = dense.swapaxes(1, 2) if transposed else dense
    out = jax.lax.ragged_dot(rows, dense, group_sizes, preferred_element_type=jnp.float32)
    # What lies past the last group is not written on every device.
    return jnp.where(jnp.arange(len(rows))[:, None] < jnp.sum(group_sizes), out, 0).astype(rows.dtype)
