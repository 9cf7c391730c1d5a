"""MXFP4 rounding that gradients pass through, so that a trained expert loses nothing when it is packed.

The grid is the encoder's (`puzzle_jax.convert_hf`): groups of 32 along the contraction axis share the scale
2**ceil(log2(amax / 6)), and values round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 times it, ties to even. In the
backward pass, rounding counts as the identity (straight-through estimator, arXiv 1308.3432).
Left out: stochastic rounding, other formats.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puzzle_jax.kernels.mxfp4 import GROUP
from puzzle_jax.model.spec import EXPERT_MATRICES, Params

_SMALLEST, _GREATEST = -125, 127  # exponents of normal numbers


def round_to_mxfp4(
    weight: Float[Array, "experts inputs outputs"],
) -> Float[Array, "experts inputs outputs"]:
    """The values that `weight` has after packing. `inputs` must be a multiple of 32."""
    experts, inputs, outputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"weight has {inputs} inputs, but MXFP4 groups need a multiple of {GROUP}")
    groups = weight.astype(jnp.float32).reshape(experts, inputs // GROUP, GROUP, outputs)
    largest = jnp.max(jnp.abs(groups), axis=2, keepdims=True)
    # largest = m * 2**e with m in [0.5, 1) and 6 = 0.75 * 2**3: exact where a logarithm would round.
    mantissa, exponent = jnp.frexp(largest)
    exponent = jnp.where(mantissa <= 0.75, exponent - 3, exponent - 2)
    exponent = jnp.where(largest > 0, jnp.clip(exponent, _SMALLEST, _GREATEST), 0)
    scale = jnp.ldexp(jnp.ones_like(largest), exponent)
    x = groups / scale
    magnitude = jnp.abs(x)
    step = jnp.where(magnitude < 2.0, 0.5, jnp.where(magnitude < 4.0, 1.0, 2.0))
    rounded = jnp.round(x / step) * step * scale
    return rounded.reshape(weight.shape).astype(weight.dtype)


def fake_quantize(
    weight: Float[Array, "experts inputs outputs"],
) -> Float[Array, "experts inputs outputs"]:
    """`round_to_mxfp4` in the forward pass, the identity in the backward pass."""
    return weight + jax.lax.stop_gradient(round_to_mxfp4(weight) - weight)


def fake_quantize_experts(params: Params) -> Params:
    """A model's parameters with every expert matrix fake-quantised; everything else is unchanged."""
    return jax.tree_util.tree_map_with_path(lambda path, x: fake_quantize(x) if is_expert_matrix(path) else x, params)


def is_expert_matrix(path: jax.tree_util.KeyPath) -> bool:
    """Returns whether a leaf of a parameter tree is one of the matrices that checkpoints may pack."""
    return isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in EXPERT_MATRICES
