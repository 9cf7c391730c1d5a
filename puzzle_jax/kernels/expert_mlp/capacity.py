"""`expert_mlp` for few tokens: every expert gets the same few rows, in as many rounds as the busiest one needs.

The weights are read in place, once per round, and never gathered into blocks; for the few tokens of decoding that is
where time goes. A round is one batched matmul over all experts, of the same shape whatever the routing, so a token's
result does not depend on which others are in the batch. No token is dropped.
Gradients are those of `sorted_blocks`, which suits the many tokens of training.
Left out: skipping experts that no token chose (their weights are read all the same); packed experts whose decoded
matrices would be large (`mxfp4.MOST_DECODED`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.expert_mlp.sorted_blocks import with_gradients_of_sorted_blocks
from puzzle_jax.kernels.expert_mlp.swiglu import apply_swiglu
from puzzle_jax.kernels.mxfp4 import as_dense, check_decoded
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Ids, IntScalar, Tokens

MAX_MEAN_ROWS = 16  # mean pairs per expert; with more, `sorted_blocks` wastes less


def round_rows(tokens: int, pairs: int, num_experts: int) -> int:
    """Rows per expert and round: a multiple of 4, usually enough for one round, at most one per token (rounded up).

    If experts were chosen evenly, their rows would be Poisson; this is the mean plus about three standard deviations.
    """
    mean = pairs / num_experts
    rows = 4 * max(1, round((mean + 3 * mean**0.5) / 4))
    return min(rows, 4 * -(-tokens // 4))


def expert_outputs(
    x: Tokens, ids: Ids, experts: Experts, *, limit: float | None, spread: int | None = None
) -> ExpertOutputs:
    """See the api. Raises NotImplementedError for more than `MAX_MEAN_ROWS` pairs per expert, and for packed experts
    that are too large to be decoded together."""
    check_decoded(x.dtype, experts.gate_up, experts.down)
    spread = spread or experts.down_bias.shape[0]
    if ids.size > MAX_MEAN_ROWS * spread:
        raise NotImplementedError(f"{ids.size} pairs are many for {spread} experts")
    return outputs_in_rounds((limit, spread), x, ids, experts)


@with_gradients_of_sorted_blocks
def outputs_in_rounds(settings: tuple[float | None, int], x: Tokens, ids: Ids, experts: Experts) -> ExpertOutputs:
    """`expert_outputs` for any number of tokens; `settings` are limit and spread."""
    limit, spread = settings
    tokens, k = ids.shape
    num_experts = experts.down_bias.shape[0]
    rows = round_rows(tokens, ids.size, spread)
    gate_up, down = as_dense(experts.gate_up, x.dtype), as_dense(experts.down, x.dtype)
    gate_up_bias = experts.gate_up_bias.astype(jnp.float32)[:, None]
    down_bias = experts.down_bias.astype(jnp.float32)[:, None]
    chosen = jnp.sum(ids[:, :, None] == jnp.arange(num_experts), axis=1)  # [tokens, experts], 0 or 1
    rank = jnp.take_along_axis(jnp.cumsum(chosen, axis=0) - chosen, ids, axis=1)  # among the expert's tokens
    # [tokens, experts]: a token's row of the expert, over all rounds; out of range if it did not choose it
    place = jnp.where(chosen > 0, jnp.cumsum(chosen, axis=0) - 1, -1)

    def one_round(index: IntScalar | int, out: Array) -> Array:
        row = rank - index * rows  # out of range: it belongs to another round
        outside = (row < 0) | (row >= rows)
        # A minimum over all tokens in place of a scatter, which XLA would compile anew in every layer.
        here = place.T[:, None] == index * rows + jnp.arange(rows)[:, None]  # [experts, rows, tokens]
        source = jnp.min(jnp.where(here, jnp.arange(tokens), tokens), axis=-1)
        h = jnp.take(x, source, axis=0, mode="fill", fill_value=0)
        h = jnp.matmul(h, gate_up, preferred_element_type=jnp.float32) + gate_up_bias
        h = apply_swiglu(h, limit).astype(x.dtype)
        h = jnp.matmul(h, down, preferred_element_type=jnp.float32) + down_bias
        return jnp.where(outside[..., None], out, h[ids, jnp.clip(row, 0, rows - 1)])

    out = jnp.zeros((tokens, k, x.shape[-1]), jnp.float32)
    if rows >= tokens:
        return one_round(0, out).astype(x.dtype)
    rounds = (jnp.max(rank) + rows) // rows
    return jax.lax.fori_loop(0, rounds, one_round, out).astype(x.dtype)
