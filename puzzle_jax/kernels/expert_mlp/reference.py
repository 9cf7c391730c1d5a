"""Reference for `expert_mlp`: every expert on every token, then selection. Plainly correct, at E / k times the work."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.mxfp4 import MXFP4, as_dense
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Float, Ids, Tokens

SWIGLU_ALPHA = 1.702


class Experts(NamedTuple):
    """One layer's experts.

    Attributes:
      gate_up: [experts, hidden, 2 * intermediate], gate and linear columns interleaved; dense or packed.
      gate_up_bias: [experts, 2 * intermediate].
      down: [experts, intermediate, hidden]; dense or packed.
      down_bias: [experts, hidden].
    """

    gate_up: Float[Array, "experts hidden two_inter"] | MXFP4
    gate_up_bias: Float[Array, "experts two_inter"]
    down: Float[Array, "experts inter hidden"] | MXFP4
    down_bias: Float[Array, "experts hidden"]


def apply_swiglu(h: Float[Array, "... two_inter"], limit: float | None) -> Float[Array, "... inter"]:
    """up * gate * sigmoid(gate) without a limit; with one, (up + 1) * gate * sigmoid(1.702 gate), with gate <= limit
    and -limit <= up <= limit, which is gpt-oss's.

    Gates are the even columns of `h`, ups the odd ones. Computed in float32.
    """
    pairs = h.astype(jnp.float32).reshape(*h.shape[:-1], h.shape[-1] // 2, 2)
    if limit is None:
        return (pairs[..., 1] * jax.nn.silu(pairs[..., 0])).astype(h.dtype)
    gate = jnp.minimum(pairs[..., 0], limit)
    up = jnp.clip(pairs[..., 1], -limit, limit)
    return ((up + 1.0) * gate * jax.nn.sigmoid(SWIGLU_ALPHA * gate)).astype(h.dtype)


def expert_outputs(
    x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None
) -> ExpertOutputs:
    """See the api. Accumulates in float32."""
    gate_up, down = as_dense(experts.gate_up, x.dtype), as_dense(experts.down, x.dtype)
    h = jnp.einsum("th,ehf->tef", x, gate_up, preferred_element_type=jnp.float32)
    h = apply_swiglu(h + experts.gate_up_bias.astype(jnp.float32), limit).astype(x.dtype)
    out = jnp.einsum("tei,eih->teh", h, down, preferred_element_type=jnp.float32)
    out = out + experts.down_bias.astype(jnp.float32)
    return jnp.take_along_axis(out, ids[:, :, None], axis=1).astype(x.dtype)
