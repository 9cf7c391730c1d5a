"""HOPE (arXiv 2609.18916): removes the experts whose pairwise interaction is least.

With F[i, j] the mean over the tokens routed to both experts i and j of the product of their gated norms, a set of
removed experts, as a 0/1 vector p, costs p' F p. The diagonal of F is REAP with squares.

The paper relaxes the quadratic program for one count and rounds its solution. Here the set grows greedily, by the
expert that adds least to p' F p, so that one order serves every count. On layers of seven experts with random weights
its cost is at most a fifth above that of the best set (tests/search/rank/test_rules.py).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """The step at which each expert is removed; the k that are never removed get the number of steps."""
    return np.stack(
        [
            removal_steps(pairs, routed, statistics.experts_per_token)
            for pairs, routed in zip(interactions(statistics), statistics.routed, strict=True)
        ]
    )


def interactions(statistics: Statistics) -> Float[np.ndarray, "layers experts experts"]:
    """F: mean products of gated norms over the tokens routed to both experts; 0 for pairs that share no token."""
    return statistics.pair_norms / np.maximum(statistics.pair_routed, 1e-30)


def removal_steps(
    pairs: Float[np.ndarray, "experts experts"], routed: Float[np.ndarray, "experts"], k: int
) -> Float[np.ndarray, "experts"]:
    """Greedy removal under p' F p; experts that are never routed to go first."""
    experts = len(pairs)
    steps, removed = np.full(experts, experts - k, float), np.zeros(experts)
    for step in range(experts - k):
        added = np.diag(pairs) + 2 * pairs @ removed
        order = np.lexsort((routed, np.where(routed == 0, -np.inf, added)))
        victim = next(expert for expert in order if not removed[expert])
        steps[victim], removed[victim] = step, 1.0
    return steps
