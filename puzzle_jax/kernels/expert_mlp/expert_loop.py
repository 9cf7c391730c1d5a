"""`expert_mlp` on CPUs: one chosen expert after another, and for each one block of its rows after another.

Every chosen expert's matrices are sliced out once and stay in the cache while its rows are processed, whereas batched
matmuls read all experts and gather them first. Experts that no token chose cost nothing, packed ones are decoded a tile
at a time in the product itself, and a token's result is bit-identical whatever the other tokens are.
Left out: accelerators, where a loop of small blocks leaves most of the device idle; bfloat16, whose conversion would
cost more than is saved; and small experts, whose matmuls are shorter than a step of the loop.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.sorted_blocks import with_gradients_of_sorted_blocks
from puzzle_jax.kernels.expert_mlp.swiglu import apply_swiglu
from puzzle_jax.kernels.grouped_matmul.layout import half_share
from puzzle_jax.kernels.mxfp4 import MXFP4, Weights, matmul
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import expert_order
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Ids, IntScalar, Tokens

MIN_EXPERT_BYTES = 1 << 18  # of one expert's two matrices in float32
MIN_BLOCK, MAX_BLOCK = 4, 64


def expert_outputs(
    x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None
) -> ExpertOutputs:
    """See the api. Raises NotImplementedError off CPUs, for dtypes other than float32, and for experts smaller than
    `MIN_EXPERT_BYTES`."""
    if target_platform() != "cpu" or x.dtype != jnp.float32:
        raise NotImplementedError(f"for float32 on CPUs, but this is {x.dtype} on {target_platform()}")
    expert_bytes = 3 * experts.down_bias.shape[1] * (experts.gate_up_bias.shape[1] // 2) * x.dtype.itemsize
    if expert_bytes < MIN_EXPERT_BYTES:
        raise NotImplementedError(f"experts of {expert_bytes} bytes are too small for a loop")
    return _expert_outputs((limit, spread or experts.down_bias.shape[0]), x, ids, experts)


@with_gradients_of_sorted_blocks
def _expert_outputs(settings: tuple[float | None, int], x: Tokens, ids: Ids, experts: Experts) -> ExpertOutputs:
    limit, spread = settings
    tokens, k = ids.shape
    num_experts = experts.down_bias.shape[0]
    block = half_share(ids.size, spread, MIN_BLOCK, MAX_BLOCK)
    order = expert_order(ids, num_experts, block)
    rows = jnp.take(x, order.source // k, axis=0, mode="fill", fill_value=0)
    blocks = -(-order.group_sizes // block)
    stop = jnp.cumsum(blocks)
    (chosen,) = jnp.nonzero(blocks, size=num_experts)

    def one_expert(index: IntScalar, out: Array) -> Array:
        expert = chosen[index]
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert), experts)

        def one_block(index: IntScalar, out: Array) -> Array:
            h = jax.lax.dynamic_slice_in_dim(rows, index * block, block)
            h = apply_swiglu(_product(h, one.gate_up) + one.gate_up_bias.astype(x.dtype), limit)
            h = _product(h, one.down) + one.down_bias.astype(x.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, h, index * block, axis=0)

        return jax.lax.fori_loop(stop[expert] - blocks[expert], stop[expert], one_block, out)

    out = jax.lax.fori_loop(0, jnp.count_nonzero(blocks), one_expert, jnp.zeros_like(rows))
    return out[order.slot].reshape(tokens, k, -1)


def _product(rows: Array, weight: Weights) -> Array:
    """Rows times the only matrix of a stack."""
    return matmul(rows, weight) if isinstance(weight, MXFP4) else rows @ weight[0].astype(rows.dtype)
