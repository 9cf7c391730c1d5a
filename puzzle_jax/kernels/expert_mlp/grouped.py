"""`expert_mlp` by grouped matmuls: rows in blocks of one expert each, twice through a kernel of `grouped_matmul`.

    gather - gate-up kernel - bias, clamped SwiGLU - down kernel - bias - gather

What lies between the kernels is elementwise and left to XLA, which fuses it with the gathers; with `fused`, the first
kernel does it too (`mosaic_gpu`). Packed weights go to the kernels as they are. Kernels do not write blocks without
rows: what the first one leaves there is set to zero, since a gradient could multiply it by zero and get NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp import mosaic_gpu
from puzzle_jax.kernels.expert_mlp.gradients import Settings, with_gradients_of
from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.swiglu import apply_swiglu
from puzzle_jax.kernels.grouped_matmul import BLOCK_IMPLEMENTATIONS, BLOCK_ROWS, in_use_rows
from puzzle_jax.kernels.grouped_matmul.mosaic_gpu import packed_matmul
from puzzle_jax.kernels.mxfp4 import MXFP4, Weights, decoded_together
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import expert_order
from puzzle_jax.kernels.shapes import Array, BlockExperts, ExpertOutputs, Float, Ids, IntScalar, Sorted, Tokens


def by(name: str, **options: bool) -> Callable[..., Array]:
    """`expert_outputs` with one of `BLOCK_IMPLEMENTATIONS`."""
    return partial(expert_outputs, kernel=partial(BLOCK_IMPLEMENTATIONS[name], **options), block_rows=BLOCK_ROWS[name])


def fused(**options: bool) -> Callable[..., Array]:
    """`expert_outputs` on Hopper GPUs with the activation in the first kernel. Its gradients are those of
    `by("mosaic_gpu")`, which keeps the input of the activation: recomputing that in the backward pass would cost one
    more matmul, and with rematerialised layers the first forward pass uses the fused kernel anyway."""
    pair = by("mosaic_gpu", **options)

    def in_two_steps(settings: Settings, x: Array, ids: Array, experts: Experts) -> Array:
        limit, spread = settings
        return pair(x, ids, experts, limit=limit, spread=spread)

    @with_gradients_of(in_two_steps)
    def outputs(settings: Settings, x: Array, ids: Array, experts: Experts) -> Array:
        limit, spread = settings
        packed = isinstance(experts.gate_up, MXFP4)
        if packed != isinstance(experts.down, MXFP4):
            raise NotImplementedError("one of an expert's matrices is packed and the other is not")
        second = {"kernel": partial(packed_matmul, **options)} if packed else {}
        first = partial(mosaic_gpu.gate_up, limit=limit, **options)
        return pair(x, ids, experts, limit=limit, spread=spread, gate_up=first, **second)

    def run(x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None) -> ExpertOutputs:
        return outputs((limit, spread or experts.down_bias.shape[0]), x, ids, experts)

    return run


def looped(x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None) -> ExpertOutputs:
    """`expert_outputs` by a loop over blocks. Raises NotImplementedError off GPUs, where there are faster ways, unless
    packed experts are too large to be decoded together."""
    if target_platform() != "gpu" and decoded_together(x.dtype, experts.gate_up, experts.down):
        raise NotImplementedError(f"a loop over blocks is for GPUs, but this is {target_platform()}")
    return by("looped", interpret=True)(x, ids, experts, limit=limit, spread=spread)


def expert_outputs(
    x: Tokens,
    ids: Ids,
    experts: Experts,
    *,
    limit: float | None,
    spread: int | None = None,
    kernel: Callable[..., Array],
    block_rows: Callable[..., int],
    gate_up: Callable[..., Array] | None = None,
) -> ExpertOutputs:
    """See the api. Raises NotImplementedError if a kernel does.

    Args:
      kernel, block_rows: a grouped matmul, and a function for the rows per block that suit it.
      gate_up: the first matmul with its activation, used instead of `activated_product` with `kernel`; `kernel` must
        accept its result.
    """
    tokens, k = ids.shape
    num_experts = experts.down_bias.shape[0]
    block = block_rows(ids.size, spread or num_experts, isinstance(experts.gate_up, MXFP4))
    order = expert_order(ids, num_experts, block)
    expert, used = order.expert, order.used
    with jax.named_scope("gather"):
        rows = jnp.take(x, order.source // k, axis=0, mode="fill", fill_value=0)
    with jax.named_scope("gate_up"):
        first = gate_up or partial(activated_product, limit=limit, kernel=kernel)
        h = first(rows, experts.gate_up, experts.gate_up_bias, expert, used)
    with jax.named_scope("down"):
        out = _plus(kernel(h, experts.down, expert, used), experts.down_bias[expert])
    with jax.named_scope("ungather"):
        return out[order.slot].reshape(tokens, k, -1).astype(x.dtype)


def activated_product(
    rows: Sorted,
    weights: Weights,
    bias: Float[Array, "experts two_inter"],
    expert: BlockExperts,
    used: IntScalar,
    *,
    limit: float | None,
    kernel: Callable[..., Array],
) -> Sorted:
    """Rows in blocks of one expert each, times their experts' matrices, activated by XLA. The product is taken as
    zero for blocks without rows, before bias and activation."""
    h = jnp.where(in_use_rows(expert, used, len(rows)), kernel(rows, weights, expert, used), 0)
    return apply_swiglu(_plus(h, bias[expert]), limit).astype(rows.dtype)


def _plus(rows: Float[Array, "padded columns"], bias: Float[Array, "blocks columns"]) -> Float[Array, "padded columns"]:
    """Adds each block's bias to its rows, in float32."""
    blocks = rows.astype(jnp.float32).reshape(len(bias), -1, rows.shape[1])
    return (blocks + bias.astype(jnp.float32)[:, None]).reshape(rows.shape)
