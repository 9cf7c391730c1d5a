"""`expert_mlp` by sorted blocks: pairs of token and expert are sorted by expert and padded to whole blocks, so that
each block is one dense matmul with one expert's weights. No token is dropped, shapes are static, and every step is
a gather or a batched matmul, so XLA differentiates it and runs it well on CPUs, where `lax.ragged_dot` is dense.

The work is proportional to the pairs plus at most one block per expert. Left out: dequantising inside the matmul;
packed weights are decoded first, all of them, and refused if that would be too large (`mxfp4.MOST_DECODED`).

Implementations whose loops have no usable gradients take those of this one.
"""

from __future__ import annotations

from contextlib import suppress

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp import grouped
from puzzle_jax.kernels.expert_mlp.gradients import Settings, with_gradients_of
from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.swiglu import clamped_swiglu
from puzzle_jax.kernels.grouped_matmul.blocked import block_rows
from puzzle_jax.kernels.mxfp4 import as_dense, check_decoded
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import expert_order
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Ids, Tokens


def expert_outputs(x: Tokens, ids: Ids, experts: Experts, *, limit: float, spread: int | None = None) -> ExpertOutputs:
    """See the api. Accumulates in float32. Raises NotImplementedError for packed experts that are too large to be
    decoded together."""
    check_decoded(x.dtype, experts.gate_up, experts.down)
    tokens, k = ids.shape
    num_experts = experts.down_bias.shape[0]
    block = block_rows(tokens * k, spread or num_experts)
    order = expert_order(ids, num_experts, block)
    with jax.named_scope("gather"):
        token = order.source // k  # `tokens` where a row is padding: filled with zeros
        rows = jnp.take(x, token, axis=0, mode="fill", fill_value=0).reshape(-1, block, x.shape[-1])
    expert = order.expert
    with jax.named_scope("gate_up"):
        gate_up = as_dense(experts.gate_up, x.dtype)[expert]
        h = jnp.einsum("nbh,nhf->nbf", rows, gate_up, preferred_element_type=jnp.float32)
        h = h + experts.gate_up_bias[expert].astype(jnp.float32)[:, None]
        h = clamped_swiglu(h, limit).astype(x.dtype)
    with jax.named_scope("down"):
        down = as_dense(experts.down, x.dtype)[expert]
        out = jnp.einsum("nbi,nih->nbh", h, down, preferred_element_type=jnp.float32)
        out = out + experts.down_bias[expert].astype(jnp.float32)[:, None]
    with jax.named_scope("ungather"):
        return out.reshape(-1, x.shape[-1])[order.slot].reshape(tokens, k, -1).astype(x.dtype)


def _differentiable(settings: Settings, x: Array, ids: Array, experts: Experts) -> Array:
    """`expert_outputs`; or on GPUs, and for packed experts that are too large to be decoded together, `looped`, which
    gathers no weights."""
    limit, spread = settings
    if target_platform() != "gpu":
        with suppress(NotImplementedError):
            return expert_outputs(x, ids, experts, limit=limit, spread=spread)
    return grouped.looped(x, ids, experts, limit=limit, spread=spread)


with_gradients_of_sorted_blocks = with_gradients_of(_differentiable)
"""Decorates implementations without gradients of their own, see `gradients`."""
