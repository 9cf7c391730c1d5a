"""EASY-EP (arXiv 2504.06792): the sum over tokens of gate * norm of the output * max(1 - cosine, 0).

The cosine is between the hidden state before and after the mixture, so tokens that the layer changes most count most.
"""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean over all tokens of gated norm times how far the mixture turned the state."""
    return statistics.mean_over_tokens(statistics.turned_norms)
