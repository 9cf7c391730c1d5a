"""MSAN, mean squared activation norm (arXiv 2606.15716): the mean squared norm of an expert's output over the tokens
routed to it."""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean squared norm of the output over routed tokens."""
    return statistics.mean_over_routed(statistics.squared_norms)
