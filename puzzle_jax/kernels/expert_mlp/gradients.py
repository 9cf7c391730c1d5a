"""Gradients for implementations of `expert_mlp` that borrow those of another.

When one is differentiated, the other runs in its place, forwards and backwards: loops have no usable gradients, and a
kernel that returns only what comes after the activation lacks what its gradient needs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.shapes import Array

Settings = tuple[float | None, int]
"""Limit of the SwiGLU, and number of experts that the pairs are spread over."""

Forward = Callable[[Settings, Array, Array, Experts], Array]
Backward = Callable[[Array], tuple[Array, Experts]]


def with_gradients_of(other: Forward) -> Callable[[Forward], Forward]:
    """Decorates `forward(settings, x, ids, experts)` to have the gradients of `other` in `x` and `experts`."""

    def decorate(forward: Forward) -> Forward:
        def save(settings: Settings, x: Array, ids: Array, experts: Experts) -> tuple[Array, Backward]:
            return jax.vjp(lambda x, experts: other(settings, x, ids, experts), x, experts)

        def backward(settings: Settings, vjp: Backward, d_out: Array) -> tuple[Array, None, Experts]:
            d_x, d_experts = vjp(d_out)
            return d_x, None, d_experts

        differentiable = jax.custom_vjp(forward, nondiff_argnums=(0,))
        differentiable.defvjp(save, backward)
        return differentiable

    return decorate
