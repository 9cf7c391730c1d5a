"""Weighted frequency: the mean gate of an expert over all tokens, 0 where it is not chosen."""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean gate over all tokens."""
    return statistics.mean_over_tokens(statistics.gates)
