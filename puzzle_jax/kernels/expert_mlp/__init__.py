"""The experts' feed-forward network: gate-up matmul, clamped SwiGLU, down matmul, weighted sum.

`expert_outputs` gives every chosen expert's own output; `expert_mlp` combines them with the gates. Implementations:
`expert_loop` on CPUs, one chosen expert after the other; `capacity` for few tokens, which reads all weights once and
gathers none; `sorted_blocks`, dropless grouped matmuls in blocks of one expert each; `reference`, every expert on
every token. All are XLA programs; under differentiation the first two become `sorted_blocks`.

Numerics are gpt-oss's: even columns of gate-up are the gate and odd ones the linear part; the gate is clamped from
above only; the gate weight multiplies after the bias of the down projection.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.expert_mlp import capacity, expert_loop, reference, sorted_blocks
from puzzle_jax.kernels.expert_mlp.weights import Experts
from puzzle_jax.kernels.route import Routing

__all__ = ["IMPLEMENTATIONS", "Experts", "combine", "expert_mlp", "expert_outputs"]

IMPLEMENTATIONS = {
    "expert_loop": expert_loop.expert_outputs,
    "capacity": capacity.expert_outputs,
    "sorted_blocks": sorted_blocks.expert_outputs,
    "reference": reference.expert_outputs,
}


def expert_outputs(
    x: Float[Array, "tokens hidden"],
    ids: Int[Array, "tokens k"],
    experts: Experts,
    *,
    limit: float,
    implementation: str | None = None,
) -> Float[Array, "tokens k hidden"]:
    """Output of each token's chosen experts, before the gates.

    Args:
      x: normalised hidden states.
      ids: experts per token.
      experts: the layer's weights, used in the dtype of `x`.
      limit: SwiGLU clamp.
      implementation: pins one of `IMPLEMENTATIONS`.
    """
    return dispatch("expert_mlp", IMPLEMENTATIONS, implementation, x, ids, experts, limit=limit)


def expert_mlp(
    x: Float[Array, "tokens hidden"],
    routing: Routing,
    experts: Experts,
    *,
    limit: float,
    implementation: str | None = None,
) -> Float[Array, "tokens hidden"]:
    """The mixture's output: chosen experts' outputs summed with their gates, in float32, then the dtype of `x`."""
    return combine(expert_outputs(x, routing.ids, experts, limit=limit, implementation=implementation), routing.gates)


def combine(outputs: Float[Array, "tokens k hidden"], gates: Float[Array, "tokens k"]) -> Float[Array, "tokens hidden"]:
    """Chosen experts' outputs summed with their gates, in float32, then the dtype of the outputs."""
    mixed = jnp.einsum("tkh,tk->th", outputs.astype(jnp.float32), gates.astype(jnp.float32))
    return mixed.astype(outputs.dtype)
