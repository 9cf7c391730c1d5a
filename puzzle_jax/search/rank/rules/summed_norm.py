"""Summed gated norm: the sum over tokens of gate * norm of the output, which arXiv 2606.15716 finds best for pruning
that serves a given task.

It is REAP without the division by how often an expert is chosen, so a rarely chosen expert scores low.
"""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean gated norm over all tokens."""
    return statistics.mean_over_tokens(statistics.gated_norms)
