"""A random order of each layer's experts, which any useful rule must beat."""

from __future__ import annotations

import numpy as np

from puzzle_jax.search.rank.statistics import ByExpert, Statistics


def score(statistics: Statistics, seed: int = 0) -> ByExpert:
    """A random permutation of ranks in every layer, the same for the same seed."""
    source = np.random.default_rng(seed)
    return np.stack([source.permutation(experts).astype(float) for experts in map(len, statistics.routed)])
