"""Joint greedy: removes, one after the other, the expert whose removal changes the mixture's output least, given those
already removed.

The squared change of a token's output is d' G d, with d the difference of gates and G the Gram matrix of the outputs of
its best-ranked experts (`rank.sample`), so that any number of removals needs no further expert evaluation. This is the
removal error with all interactions between removed experts; the pairwise terms of HOPE (arXiv 2609.18916) approximate
the same quantity by norms.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.search.rank.sample import Sample, first_left, gates_of, remove_one_by_one
from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """The step at which each expert is removed."""
    return statistics.by_sample(removal_steps)


@partial(jax.jit, static_argnames="k")
def removal_steps(sample: Sample, routed: Float[Array, "experts"], k: int) -> Int[Array, "experts"]:
    """The step at which each expert of a layer is removed; the k that are never removed get the number of steps.

    Of equal experts the one that is routed to least is removed first.
    """
    ids = sample.order[:, : sample.logits.shape[1]]
    whole = gates_of(sample.logits, jnp.ones(ids.shape, bool), k)

    def error(alive: Bool[Array, "... ranks"], gates: Array, gram: Array) -> Float[Array, "..."]:
        change = gates - whole[(slice(None), *[None] * (alive.ndim - 2))]
        return jnp.einsum("...r,...rs,...s->...", change, gram, change)

    def growth(alive_experts: Bool[Array, "experts"]) -> Float[Array, "experts"]:
        """The amount that the removal of each expert adds to the summed error."""
        alive = alive_experts[ids]
        now = error(alive, gates_of(sample.logits, alive, k), sample.gram)
        ranks = alive.shape[1]
        one_less = alive[:, None] & ~jnp.eye(ranks, dtype=bool)
        gates = gates_of(sample.logits[:, None], one_less, k)
        added = error(one_less, gates, sample.gram[:, None]) - now[:, None]
        added = jnp.where(first_left(alive, k), added, 0.0) * sample.weight[:, None]
        return jnp.zeros(alive_experts.shape).at[ids].add(added)

    return remove_one_by_one(growth, routed, k)
