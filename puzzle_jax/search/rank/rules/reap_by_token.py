"""REAP (arXiv 2510.13999) as published: the mean of gate * norm over routed tokens, every token with the same weight.

Long traces, and tasks with many of them, count for more than under `reap`.
"""

from __future__ import annotations

import numpy as np

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics) -> ByExpert:
    """Mean gated norm over routed tokens."""
    return statistics.token_gated_norms / np.maximum(statistics.token_routed, 1e-30)
