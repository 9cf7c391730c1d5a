"""`expert_mlp` by sorted blocks: pairs of token and expert are sorted by expert and padded to whole blocks, so that
each block is one dense matmul with one expert's weights. No token is dropped, shapes are static, and every step is
a gather or a batched matmul, which XLA runs well on CPUs, where `lax.ragged_dot` is dense.

The work is proportional to the pairs plus at most one block per expert. Gradients are formed in blocks too, and rows go
back to tokens by gathers: JAX would derive scatters, which XLA for CPUs runs row by row. The backward pass keeps the
inputs of the activation and computes the rest again. Left out: dequantising inside the matmul; packed weights are
decoded first, all of them, and refused if that would be too large (`mxfp4.MOST_DECODED`).

Implementations whose loops have no usable gradients take those of this one.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp import grouped
from puzzle_jax.kernels.expert_mlp.gradients import Settings, with_gradients_of
from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.swiglu import apply_swiglu
from puzzle_jax.kernels.grouped_matmul.blocked import block_rows
from puzzle_jax.kernels.grouped_matmul.layout import Blocks
from puzzle_jax.kernels.mxfp4 import as_dense, check_decoded
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import expert_order
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Float, Ids, Tokens


def expert_outputs(
    x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None
) -> ExpertOutputs:
    """See the api. Accumulates in float32. Raises NotImplementedError for packed experts that are too large to be
    decoded together."""
    check_decoded(x.dtype, experts.gate_up, experts.down)
    num_experts = experts.down_bias.shape[0]
    order = expert_order(ids, num_experts, block_rows(ids.size, spread or num_experts))
    gate_up, down = as_dense(experts.gate_up, x.dtype), as_dense(experts.down, x.dtype)
    return _outputs(limit, x, ids, order, Dense(gate_up, experts.gate_up_bias, down, experts.down_bias))


class Dense(NamedTuple):
    """`Experts` whose matrices are not packed, in the dtype of the tokens."""

    gate_up: Float[Array, "experts hidden two_inter"]
    gate_up_bias: Float[Array, "experts two_inter"]
    down: Float[Array, "experts inter hidden"]
    down_bias: Float[Array, "experts hidden"]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _outputs(limit: float | None, x: Tokens, ids: Ids, order: Blocks, experts: Dense) -> ExpertOutputs:
    return _save(limit, x, ids, order, experts)[0]


Saved = tuple[Array, Array, Blocks, Dense, Array]


def _save(limit: float | None, x: Array, ids: Array, order: Blocks, experts: Dense) -> tuple[Array, Saved]:
    expert = order.expert
    with jax.named_scope("gather"):
        rows = _rows(x, ids, order)
    with jax.named_scope("gate_up"):
        h = jnp.einsum("nbh,nhf->nbf", rows, experts.gate_up[expert], preferred_element_type=jnp.float32)
        h = h + experts.gate_up_bias[expert].astype(jnp.float32)[:, None]
    with jax.named_scope("down"):
        activated = apply_swiglu(h, limit).astype(x.dtype)
        out = jnp.einsum("nbi,nih->nbh", activated, experts.down[expert], preferred_element_type=jnp.float32)
        out = out + experts.down_bias[expert].astype(jnp.float32)[:, None]
    with jax.named_scope("ungather"):
        return _of_pairs(out, order).reshape(*ids.shape, -1).astype(x.dtype), (x, ids, order, experts, h)


def _backward(limit: float | None, saved: Saved, d_outputs: Array) -> tuple[Array, None, None, Dense]:
    x, ids, order, experts, h = saved
    expert = order.expert
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    with jax.named_scope("gather"):
        rows = _rows(x, ids, order)
        d_out = jnp.take(d_outputs.reshape(ids.size, -1), order.source, axis=0, mode="fill", fill_value=0)
        d_out = _in_blocks(d_out, order)
    with jax.named_scope("down"):
        activated, d_activation = jax.vjp(lambda h: apply_swiglu(h, limit).astype(x.dtype), h)
        d_activated = product("nbh,nih->nbi", d_out, experts.down[expert])
        d_down = _by_expert(product("nbi,nbh->nih", activated, d_out), order)
    with jax.named_scope("gate_up"):
        d_h = d_activation(d_activated.astype(x.dtype))[0].astype(x.dtype)
        d_rows = product("nbf,nhf->nbh", d_h, experts.gate_up[expert])
        d_gate_up = _by_expert(product("nbh,nbf->nhf", rows, d_h), order)
    with jax.named_scope("ungather"):
        d_x = _of_pairs(d_rows, order).reshape(*ids.shape, -1).sum(axis=1).astype(x.dtype)
    d_biases = (_by_expert(jnp.sum(each, axis=1, dtype=jnp.float32), order) for each in (d_h, d_out))
    found = Dense(d_gate_up, next(d_biases), d_down, next(d_biases))
    return d_x, None, None, jax.tree.map(lambda gradient, weight: gradient.astype(weight.dtype), found, experts)


_outputs.defvjp(_save, _backward)


def _rows(x: Tokens, ids: Ids, order: Blocks) -> Float[Array, "blocks rows hidden"]:
    """The token of every row, in blocks. Padding holds the last token, as finite as the others: no pair reads what
    comes of it, and gradients of its outputs are zero."""
    return _in_blocks(jnp.take(x, order.source // ids.shape[1], axis=0, mode="clip"), order)


def _in_blocks(each: Array, order: Blocks) -> Float[Array, "blocks rows columns"]:
    """Rows of an array in blocks."""
    return each.reshape(len(order.expert), -1, each.shape[1])


def _of_pairs(blocks: Float[Array, "blocks rows columns"], order: Blocks) -> Float[Array, "pairs columns"]:
    """The row of every pair; zeros for pairs whose expert is not among those at hand."""
    return jnp.take(blocks.reshape(-1, blocks.shape[-1]), order.slot, axis=0, mode="fill", fill_value=0)


def _by_expert(blocks: Float[Array, "blocks ..."], order: Blocks) -> Float[Array, "experts ..."]:
    """Sums over the blocks of each expert."""
    experts = len(order.group_sizes)
    return jax.ops.segment_sum(blocks, order.expert, num_segments=experts, indices_are_sorted=True)


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
