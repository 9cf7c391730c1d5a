"""REAP (arXiv 2510.13999): the mean over the tokens routed to an expert of gate * norm of its output.

Tokens are weighted so that every trace and every task counts the same (`rank.rows`); `reap_by_token` is the unweighted
form.
"""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean gated norm over routed tokens, with every trace and every task at the same weight."""
    return statistics.mean_over_routed(statistics.gated_norms)
