"""Gradients for implementations of `expert_mlp` whose loops have none worth having."""

from __future__ import annotations

from collections.abc import Callable

import jax

from puzzle_jax.kernels.expert_mlp import sorted_blocks
from puzzle_jax.kernels.expert_mlp.weights import Experts
from puzzle_jax.kernels.shapes import Array

Settings = tuple[float, int]
Backward = Callable[[Array], tuple[Array, Experts]]
Forward = Callable[[Settings, Array, Array, Experts], Array]


def with_gradients_of_sorted_blocks(forward: Forward) -> Forward:
    """`forward((limit, spread), x, ids, experts)`; where it is differentiated, in `x` and `experts`, `sorted_blocks`
    runs in its place, forwards and backwards."""

    def save(settings: Settings, x: Array, ids: Array, experts: Experts) -> tuple[Array, Backward]:
        limit, spread = settings

        def run(x: Array, experts: Experts) -> Array:
            return sorted_blocks.expert_outputs(x, ids, experts, limit=limit, spread=spread)

        return jax.vjp(run, x, experts)

    def backward(settings: Settings, vjp: Backward, d_out: Array) -> tuple[Array, None, Experts]:
        d_x, d_experts = vjp(d_out)
        return d_x, None, d_experts

    differentiable = jax.custom_vjp(forward, nondiff_argnums=(0,))
    differentiable.defvjp(save, backward)
    return differentiable
