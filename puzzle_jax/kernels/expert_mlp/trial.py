"""Trials of kernels of `expert_mlp`: with few experts, and about the actual number of pairs per expert."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, Weights
from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Ids, Tokens

EXPERTS, MOST_PAIRS = 8, 512
"""Experts of a trial, and the most mean pairs per expert; with more, blocks of rows would be no larger."""


def trial(x: Tokens, ids: Ids, experts: Experts, spread: int, limit: float | None, run: Callable[..., Array]) -> Trial:
    """A trial for these arguments; `run` is the api. Pairs per expert are rounded to a power of two."""
    num_experts, hidden, two_inter = experts.gate_up.shape
    k, of_weights = ids.shape[1], None if isinstance(experts.gate_up, MXFP4) else experts.gate_up.dtype
    pairs = min(1 << max(0, round(math.log2(max(ids.size / spread, 1)))), MOST_PAIRS)
    dtype, count = jnp.dtype(x.dtype), max(min(EXPERTS, num_experts), k)
    name = f"{dtype.name} {of_weights or 'mxfp4'} {hidden}x{two_inter // 2} top {k} pairs {pairs}"

    def arrays() -> tuple[Array, Array, Experts]:
        source = np.random.default_rng(0)
        tokens = max(1, pairs * count // k)
        chance = np.arange(1, count + 1) + (0.0 if count > k else 1.0)  # uneven
        chosen = [source.choice(count, k, replace=False, p=chance / chance.sum()) for _ in range(tokens)]
        keys = jax.random.split(jax.random.key(0), 5)
        matrices = [
            _matrix(source, keys[i], (count, *shape), of_weights)
            for i, shape in enumerate(((hidden, two_inter), (two_inter // 2, hidden)))
        ]
        biases = [
            jax.random.normal(keys[2 + i], (count, size), bias.dtype)
            for i, (size, bias) in enumerate(((two_inter, experts.gate_up_bias), (hidden, experts.down_bias)))
        ]
        rows = jax.random.normal(keys[4], (tokens, hidden), dtype)
        own = Experts(matrices[0], biases[0], matrices[1], biases[1])
        return rows, jnp.asarray(np.stack(chosen), ids.dtype), own

    def outputs(rows: Array, ids: Array, experts: Experts, **named: str | None) -> Array:
        return run(rows, ids, experts, limit=limit, **named)

    return Trial(name, arrays, outputs, differentiable=(0,))


def _matrix(source: np.random.Generator, key: Array, shape: tuple[int, ...], dtype: jnp.dtype | None) -> Weights:
    """A stack of matrices [experts, inputs, outputs], packed if there is no dtype."""
    experts, inputs, outputs = shape
    if dtype is not None:
        return (jax.random.normal(key, shape, jnp.float32) * inputs**-0.5).astype(dtype)
    codes = source.integers(0, 256, (experts, outputs, inputs // 2), np.uint8)
    scales = source.integers(119, 123, (experts, outputs, inputs // GROUP)).astype(np.uint8)
    return MXFP4(jnp.asarray(codes), jnp.asarray(scales))
