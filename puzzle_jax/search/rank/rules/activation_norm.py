"""MAN, mean activation norm (arXiv 2606.15716): the mean norm of an expert's output over the tokens routed to it.

Neither gates nor routing frequency enter. The paper recommends it for pruning that serves no task in particular.
"""

from __future__ import annotations

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean norm of the output over routed tokens."""
    return statistics.mean_over_routed(statistics.norms)
