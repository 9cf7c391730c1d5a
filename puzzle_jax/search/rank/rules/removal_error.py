"""Removal error: the mean over tokens of mean_d (y'_d - y_d)^2, where y' is the mixture's output without the expert.

The token is routed again, as a child without the expert would route it, so the error includes what the expert that
takes its place contributes. This is the exact effect of one removal on the layer's output; the effects of several
removals do not add up (see `joint_greedy`).
"""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean squared change of the layer's output by each expert's removal."""
    return statistics.mean_over_tokens(statistics.removal)
