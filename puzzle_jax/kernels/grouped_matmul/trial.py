"""Trials of kernels of `grouped_matmul`: with few experts of uneven shares, one of them without rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights
from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Sorted

EXPERTS, MOST_ROWS = 6, 512


def trial(rows: Sorted, weights: Weights, transposed: bool, run: Callable[..., Array]) -> Trial:
    """A trial for these arguments; `run` is the api. Rows per expert are rounded to a power of two."""
    count, inputs, outputs = weights.shape
    dtype, of_weights = jnp.dtype(rows.dtype), None if isinstance(weights, MXFP4) else weights.dtype
    share = min(1 << max(0, round(math.log2(max(len(rows) / count, 1)))), MOST_ROWS)
    name = f"{dtype.name} {of_weights or 'mxfp4'} {inputs}x{outputs}{' transposed' if transposed else ''} rows {share}"

    def arrays() -> tuple[Array, Weights, Array]:
        source = np.random.default_rng(0)
        sizes = source.multinomial(share * EXPERTS, np.arange(EXPERTS) / np.arange(EXPERTS).sum())
        keys = jax.random.split(jax.random.key(0), 2)
        columns = outputs if transposed else inputs
        own = jax.random.normal(keys[0], (share * EXPERTS, columns), dtype)
        if of_weights is None:
            codes = source.integers(0, 256, (EXPERTS, outputs, inputs // 2), np.uint8)
            scales = source.integers(119, 123, (EXPERTS, outputs, inputs // GROUP)).astype(np.uint8)
            matrices: Weights = MXFP4(jnp.asarray(codes), jnp.asarray(scales))
        else:
            matrices = (jax.random.normal(keys[1], (EXPERTS, inputs, outputs)) * columns**-0.5).astype(of_weights)
        return own, matrices, jnp.asarray(sizes, jnp.int32)

    def multiply(rows: Array, weights: Weights, sizes: Array, **named: str | None) -> Array:
        return run(rows, weights, sizes, transposed=transposed, **named)

    return Trial(name, arrays, multiply, differentiable=(0,))
