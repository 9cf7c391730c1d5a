"""Ranked choice: an election in which every token votes, by its router logits, for the k best experts that are left.

The expert with the fewest votes is removed and its votes pass to the next in each voter's order, as in a single
transferable vote. An expert that no token votes for goes first.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.search.rank.sample import Sample, first_left, remove_one_by_one
from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """The step at which each expert is voted out."""
    return statistics.by_sample(removal_steps)


@partial(jax.jit, static_argnames="k")
def removal_steps(sample: Sample, routed: Float[Array, "experts"], k: int) -> Int[Array, "experts"]:
    """The step at which each expert of a layer is voted out; the k that are left at the end get the number of steps."""

    def votes(alive_experts: Bool[Array, "experts"]) -> Float[Array, "experts"]:
        chosen = first_left(alive_experts[sample.order], k) * sample.weight[:, None]
        return jnp.zeros(alive_experts.shape).at[sample.order].add(chosen)

    return remove_one_by_one(votes, routed, k)
