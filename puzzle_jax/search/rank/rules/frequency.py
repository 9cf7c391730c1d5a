"""Frequency: the share of tokens that are routed to an expert, the oldest rule."""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Share of tokens routed to each expert."""
    return statistics.mean_over_tokens(statistics.routed)
