"""A fixed number of sampled tokens per layer, for rules that remove one expert after the other.

A token's output with any set of experts is a combination of its highest-ranked experts' outputs. A sampled token
therefore carries the Gram matrix of these outputs, and after one evaluation no expert is run again, whichever set is
asked about.

Tokens are drawn uniformly, a fixed number from every batch, of which a reservoir keeps a fixed number in all, so memory
does not grow with the number of traces. They count by their weights.

Left out: experts below a token's best ranks. A token whose best ranks are all removed counts as having zero output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

RANKS_PER_CHOICE = 4
"""Ranks kept per expert that a token is routed to; with half of the experts removed, they hold most of the best k."""


class Sample(NamedTuple):
    """Sampled tokens of one layer.

    Attributes:
      key: random keys, of which the reservoir keeps the largest; -inf where there is no token.
      weight: how much the token counts; 0 where there is none.
      order: experts by router logit, best first.
      logits: router logits of the best ranks.
      gram: inner products of those experts' outputs, over the hidden size.
    """

    key: Float[Array, "tokens"]
    weight: Float[Array, "tokens"]
    order: Int[Array, "tokens experts"]
    logits: Float[Array, "tokens ranks"]
    gram: Float[Array, "tokens ranks ranks"]


def num_ranks(experts: int, experts_per_token: int) -> int:
    return min(experts, RANKS_PER_CHOICE * experts_per_token)


def empty_sample(tokens: int, experts: int, ranks: int) -> Sample:
    """An empty reservoir for `tokens` tokens."""
    return Sample(
        jnp.full(tokens, -jnp.inf, jnp.float32),
        jnp.zeros(tokens),
        jnp.zeros((tokens, experts), jnp.int32),
        jnp.zeros((tokens, ranks)),
        jnp.zeros((tokens, ranks, ranks)),
    )


def draw(random: PRNGKeyArray, weight: Float[Array, "tokens"], count: int) -> tuple[Array, Array, Array]:
    """Keys, weights and indices of `count` tokens of a batch, drawn uniformly from those whose weight is not 0.

    Weights are divided by the share of those tokens that is drawn.
    """
    first, second = jax.random.split(random)
    present = weight > 0
    _, index = jax.lax.top_k(jnp.where(present, jax.random.uniform(first, weight.shape), -1.0), count)
    share = jnp.sum(present[index]) / jnp.maximum(jnp.sum(present), 1)
    key = jnp.where(present[index], jax.random.uniform(second, index.shape), -jnp.inf)
    return key, weight[index] / jnp.maximum(share, 1e-30), index


def merge(reservoir: Sample, new: Sample) -> Sample:
    """The tokens with the largest keys of both samples."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), reservoir, new)
    _, best = jax.lax.top_k(both.key, reservoir.key.shape[0])
    return jax.tree.map(lambda x: x[best], both)


def gram_matrices(outputs: Float[Array, "tokens ranks hidden"]) -> Float[Array, "tokens ranks ranks"]:
    return jnp.einsum("trh,tsh->trs", outputs, outputs) / outputs.shape[-1]


Loss = Callable[[Bool[Array, "experts"]], Float[Array, "experts"]]
"""Loss by the removal of each expert, given a mask of those that are left."""


def remove_one_by_one(loss: Loss, routed: Float[Array, "experts"], k: int) -> Int[Array, "experts"]:
    """The step at which each expert is removed when the one of least loss goes first; the k that are never removed get
    the number of steps. Of equal experts the one that is routed to least is removed first."""
    steps = routed.shape[0] - k

    def remove(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        alive, removed_at = state
        values = jnp.where(alive, loss(alive), jnp.inf)
        cheapest = values <= jnp.min(values)
        victim = jnp.argmin(jnp.where(cheapest & alive, routed, jnp.inf))
        return alive.at[victim].set(False), removed_at.at[victim].set(step)

    start = (jnp.ones(routed.shape, bool), jnp.full(routed.shape, steps, jnp.int32))
    return jax.lax.fori_loop(0, steps, remove, start)[1]


def first_left(alive: Bool[Array, "... ranks"], k: int) -> Bool[Array, "... ranks"]:
    """A mask of the first k ranks that are left."""
    return alive & (jnp.cumsum(alive, axis=-1) <= k)


def gates_of(logits: Float[Array, "... ranks"], alive: Bool[Array, "... ranks"], k: int) -> Float[Array, "... ranks"]:
    """Softmax over the first k ranks that are left; all 0 if none is."""
    chosen = first_left(alive, k)
    seen = jnp.where(chosen, logits, -jnp.inf)
    weights = jnp.where(chosen, jnp.exp(seen - jnp.max(seen, axis=-1, keepdims=True, initial=-1e30)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-30)
