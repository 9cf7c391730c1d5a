"""SwiGLU, clamped or plain, with its gradient in one pass.

With a limit:

    out = (up + 1) g s,   g = min(gate, limit), up within +-limit, s = sigmoid(a g)
    d gate = d_out (up + 1) s (1 + a g (1 - s))   where gate < limit, else 0
    d up   = d_out g s                            where |up| < limit, else 0

Without one, out = up g s, a is 1, and nothing is clamped. Gates are the even columns and ups the odd ones.
Differentiated step by step, each of the two would become an array of its own, scattered over every second column; on a
CPU that takes longer than a matmul of the layer.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp.reference import SWIGLU_ALPHA
from puzzle_jax.kernels.expert_mlp.reference import apply_swiglu as plain
from puzzle_jax.kernels.shapes import Array, Float


def apply_swiglu(h: Float[Array, "*rows two_inter"], limit: float | None) -> Float[Array, "*rows inter"]:
    """As in the reference, computed in float32."""
    return _activation(h, limit)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _activation(h: Array, limit: float | None) -> Array:
    return plain(h, limit)


def _save(h: Array, limit: float | None) -> tuple[Array, Array]:
    return plain(h, limit), h


def _backward(limit: float | None, h: Array, d_out: Array) -> tuple[Array]:
    pairs = h.astype(jnp.float32).reshape(*h.shape[:-1], h.shape[-1] // 2, 2)
    bound, alpha, offset = (jnp.inf, 1.0, 0.0) if limit is None else (limit, SWIGLU_ALPHA, 1.0)
    gate, up = jnp.minimum(pairs[..., 0], bound), jnp.clip(pairs[..., 1], -bound, bound)
    s = jax.nn.sigmoid(alpha * gate)
    d_out = d_out.astype(jnp.float32)
    d_gate = jnp.where(pairs[..., 0] < bound, d_out * (up + offset) * s * (1.0 + alpha * gate * (1.0 - s)), 0.0)
    d_up = jnp.where(jnp.abs(pairs[..., 1]) < bound, d_out * gate * s, 0.0)
    even = jnp.arange(2) == 0
    return (jnp.where(even, d_gate[..., None], d_up[..., None]).reshape(h.shape).astype(h.dtype),)


_activation.defvjp(_save, _backward)
