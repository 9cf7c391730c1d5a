"""The experts' feed-forward network: gate-up matmul, SwiGLU, clamped or plain, down matmul, weighted sum.

`expert_outputs` returns every chosen expert's own output; `expert_mlp` combines them with the gates, by expert
parallelism on a mesh. Implementations: `mosaic_gpu` and `mosaic_tpu`, by the kernels of `grouped_matmul`, and
`mosaic_gpu_fused`, whose first matmul includes the activation, where they have passed their self-check; `expert_loop`
on CPUs, one chosen expert after another; `capacity` for few tokens, which reads all weights once and gathers none;
`ragged_dot` on TPUs and `looped` on GPUs, see `grouped_matmul`; `sorted_blocks`, dropless matmuls in blocks of one
expert each; `reference`, every expert on every token; and, only by name, `tokamax`. All but the kernels and tokamax's
are XLA programs. Under differentiation `expert_loop` and `capacity` become `sorted_blocks`, or `looped` on GPUs, and
`mosaic_gpu_fused` becomes `mosaic_gpu`. Without a kernel, packed experts that are too large to be decoded together
(`mxfp4.MOST_DECODED`) go through `expert_loop` or `looped`.

Even columns of gate-up are the gate and odd ones the linear part; a clamp limits the gate only from above; the gate
weight multiplies after the bias of the down projection.
"""

from __future__ import annotations

from functools import partial
from typing import TypeGuard

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels import checks
from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.expert_mlp import capacity, expert_loop, grouped, parallel, reference, sorted_blocks
from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.trial import trial
from puzzle_jax.kernels.route import Routing
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Float, Ids, Tokens

__all__ = ["IMPLEMENTATIONS", "Experts", "combine", "expert_mlp", "expert_outputs"]

IMPLEMENTATIONS = {
    "mosaic_gpu_fused": grouped.fused(),
    "mosaic_gpu": grouped.by("mosaic_gpu"),
    "mosaic_tpu": grouped.by("mosaic_tpu"),
    "tokamax": grouped.by("tokamax"),
    "expert_loop": expert_loop.expert_outputs,
    "capacity": capacity.expert_outputs,
    "ragged_dot": grouped.by("ragged_dot"),
    "looped": grouped.looped,
    "sorted_blocks": sorted_blocks.expert_outputs,
    "reference": reference.expert_outputs,
}


def expert_outputs(
    x: Tokens,
    ids: Ids,
    experts: Experts,
    *,
    limit: float | None,
    spread: int | None = None,
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> ExpertOutputs:
    """Output of each token's chosen experts, before the gates.

    Args:
      x: normalised hidden states.
      ids: chosen experts of each token.
      experts: the layer's weights, used in the dtype of `x`.
      limit: SwiGLU clamp; None for plain SwiGLU.
      spread: number of experts that the pairs are spread over, by which blocks are sized; larger than the number of
        `experts` if these are one device's share. Ids past these belong to other devices; their output is undefined.
      implementation: pins one of `IMPLEMENTATIONS`.
      mesh: as in `expert_mlp`; all devices of the model axis get all outputs.

    Raises ValueError for shapes that do not fit, NotImplementedError if no implementation accepts the arguments.
    """
    _check(x, ids, experts)
    if not ids.size:
        return jnp.zeros((*ids.shape, x.shape[1]), x.dtype)
    if _spreads(mesh, len(experts.down_bias)):
        outputs = partial(expert_outputs, limit=limit, spread=len(experts.down_bias), implementation=implementation)
        return parallel.separate(x, ids, experts, outputs, mesh=mesh)
    return dispatch(
        "expert_mlp",
        IMPLEMENTATIONS,
        implementation,
        x,
        ids,
        experts,
        limit=limit,
        spread=spread,
        trial=partial(trial, x, ids, experts, spread or len(experts.down_bias), limit, expert_outputs),
    )


def _check(x: Array, ids: Array, experts: Experts) -> None:
    """Checks shapes, before anything runs."""
    num_experts, hidden, two_inter = experts.gate_up.shape
    expected = {
        "x": (x, (len(ids), hidden)),
        "experts.gate_up_bias": (experts.gate_up_bias, (num_experts, two_inter)),
        "experts.down": (experts.down, (num_experts, two_inter // 2, hidden)),
        "experts.down_bias": (experts.down_bias, (num_experts, hidden)),
    }
    checks.floating(x=x)
    checks.shapes(f"experts.gate_up of shape {experts.gate_up.shape} for ids of shape {ids.shape}", expected)


def expert_mlp(
    x: Float[Array, "*positions hidden"],
    routing: Routing,
    experts: Experts,
    *,
    limit: float | None,
    implementation: str | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    way: str | None = None,
) -> Float[Array, "*positions hidden"]:
    """The mixture's output: the sum of chosen experts' outputs times their gates, in float32, then the dtype of `x`.

    Args:
      x: normalised hidden states, of a list of tokens or of rows of tokens; `routing` lists the tokens row by row.
      mesh: mesh whose axis "model" shards the experts and whose other axes shard the tokens, see `parallel`. Without
        one, or if the model axis does not divide the experts, XLA sees to it that every device has what it needs.
      way: pins one of `parallel.WAYS`.
    """
    spread = experts.down_bias.shape[0]
    outputs = partial(expert_outputs, limit=limit, spread=spread, implementation=implementation)
    if _spreads(mesh, spread):
        return parallel.mixture(x, routing, experts, outputs, combine, mesh=mesh, way=way)
    tokens = x.reshape(-1, x.shape[-1])
    return combine(outputs(tokens, routing.ids, experts), routing.gates).reshape(x.shape)


def _spreads(mesh: Mesh | AbstractMesh | None, experts: int) -> TypeGuard[Mesh | AbstractMesh]:
    """Returns whether each device of a mesh can hold experts of its own."""
    return mesh is not None and mesh.size > 1 and experts % mesh.shape["model"] == 0


def combine(outputs: ExpertOutputs, gates: Float[Array, "tokens k"]) -> Tokens:
    """The sum of chosen experts' outputs times their gates, in float32, then the dtype of the outputs."""
    mixed = jnp.einsum("tkh,tk->th", outputs.astype(jnp.float32), gates.astype(jnp.float32))
    return mixed.astype(outputs.dtype)
