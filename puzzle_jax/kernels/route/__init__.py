"""Routing: which experts serve a token, and with what weight.

`route` picks the top k router logits and turns them into gates by a softmax over the chosen ones alone, as gpt-oss
does. `expert_order` lays the chosen (token, expert) pairs out in blocks that belong to one expert each, the form
that grouped matmuls want. Both are pure functions with static shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.grouped_matmul.layout import Blocks, blocks_of
from puzzle_jax.kernels.shapes import Array, Bool, Float, Ids

_ITERATED_ARGMAX_LIMIT = 8  # up to here k passes of argmax beat a sort on CPU


class Routing(NamedTuple):
    """The experts of each token, best first, and their gates, which sum to one."""

    ids: Ids
    gates: Float[Array, "tokens k"]


def route(
    logits: Float[Array, "tokens experts"],
    k: int,
    *,
    mask: Bool[Array, "tokens experts"] | Bool[Array, "#tokens experts"] | None = None,
    ids: Ids | None = None,
) -> Routing:
    """Chooses `k` experts per token.

    Args:
      logits: router logits.
      k: experts per token; equal logits are taken in order of their index.
      mask: False removes an expert: its logit becomes minus infinity before the choice. At least `k` must stay.
      ids: choices to replay in place of the top k; gates are then the softmax of the given experts' own logits.

    Differentiable in `logits` through the gates.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"cannot choose {k} of {logits.shape[-1]} experts")
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if ids is None:
        ids = top_k_ids(logits, k)
    gates = jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)
    return Routing(ids, gates)


def top_k_ids(logits: Float[Array, "tokens experts"], k: int) -> Ids:
    """Indices of the k largest logits, largest first, lower index first among equals."""
    logits = jax.lax.stop_gradient(logits)
    if k > _ITERATED_ARGMAX_LIMIT:
        return jax.lax.top_k(logits, k)[1]
    chosen = []
    taken = jnp.zeros(logits.shape, bool)
    for _ in range(k):
        # A taken expert ranks below one that is masked out, so that no index ever appears twice.
        rank = jnp.where(taken, -jnp.inf, jnp.maximum(logits, jnp.finfo(logits.dtype).min))
        best = jnp.argmax(rank, axis=-1)
        chosen.append(best)
        taken = taken | jax.nn.one_hot(best, logits.shape[-1], dtype=bool)
    return jnp.stack(chosen, axis=-1)


def expert_order(ids: Ids, num_experts: int, block: int) -> Blocks:
    """Flat pairs (token * k + choice) in blocks of one expert each; nothing is dropped.

    A row of padding has the number of pairs for its source, which is out of range.
    """
    pairs, flat = ids.size, ids.reshape(-1)
    group_sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1)
    sorted_pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    blocks = blocks_of(group_sizes, pairs, block, flat[sorted_pairs])
    source = jnp.take(sorted_pairs, blocks.source, mode="fill", fill_value=pairs)
    slot = jnp.zeros(pairs, jnp.int32).at[sorted_pairs].set(blocks.slot)
    return blocks._replace(source=source, slot=slot)
