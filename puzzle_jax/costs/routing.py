"""How tokens spread over a layer's experts: how many experts they touch, and how many rows their tiles hold.

A mixture of E experts routes each of n tokens to k of them; p_e is the probability that a token chooses expert e, so
sum_e p_e = k. Even routing means p_e = k / E. Tokens are taken to choose independently.

    experts touched = sum_e 1 - (1 - p_e)^n
    rows of tiles   = sum_e E[ceil(r_e / tile)] tile,   r_e ~ Binomial(n, p_e)

Measured routing is given as a profile: the relative loads of a layer's experts, largest first. A mixture that keeps
fewer experts is taken to keep those with the largest loads. Left out: correlation between neighbouring requests, whose
texts repeat themselves and therefore choose alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log, log1p

import numpy as np

from puzzle_jax.errors import ConfigError
from puzzle_jax.numeric import Number, is_number

Profile = tuple[Number, ...]

_LEAST = 1e-6
"""Least share of tokens that an expert is credited with: one that a sample of texts never chose may still be used."""


def routing_profile(routed: np.ndarray) -> Profile:
    """Returns the profile of a model from the number of tokens routed to each expert, [layers, experts].

    Loads are sorted within every layer, then averaged over layers; none is exactly 0.
    """
    shares = np.sort(np.maximum(routed / routed.sum(axis=1, keepdims=True), _LEAST), axis=1)[:, ::-1]
    return tuple(float(share) for share in shares.mean(axis=0))


def probabilities(num_experts: int, experts_per_token: int, profile: Profile | None = None) -> np.ndarray:
    """Probability that a token chooses each expert, [experts]; uniform without a profile.

    Loads are scaled so that they sum to `experts_per_token`, and none exceeds 1.

    Raises `ConfigError` for a profile that is shorter than the mixture, not descending, or not positive.
    """
    if profile is None:
        return np.full(num_experts, experts_per_token / num_experts)
    _check(profile, num_experts)
    loads = np.asarray(profile[:num_experts], float)
    certain = 0  # number of experts, largest load first, that every token chooses
    while True:
        rest = loads[certain:]
        scaled = rest * ((experts_per_token - certain) / rest.sum())
        if scaled[0] <= 1 or certain == experts_per_token:
            return np.concatenate([np.ones(certain), np.minimum(scaled, 1.0)])
        certain += 1


def active_experts(chosen: np.ndarray, tokens: Number) -> float:
    """Expected number of experts that at least one of the tokens chooses, given each one's probability [experts]."""
    return float(np.sum(1.0 - (1.0 - chosen) ** tokens))


def tiled_rows(chosen: np.ndarray, tokens: int, tile: int) -> float:
    """Expected rows when each expert's tokens fill whole tiles of `tile` rows; arguments as in `active_experts`."""
    values, counts = np.unique(chosen, return_counts=True)
    expected = [_expected_tiles(value, tokens, tile) for value in values.tolist()]
    return tile * sum(count * tiles for count, tiles in zip(counts.tolist(), expected, strict=True))


@lru_cache(maxsize=1 << 16)
def _expected_tiles(chosen: float, tokens: int, tile: int) -> float:
    """E[ceil(r / tile)] for r ~ Binomial(tokens, chosen); cached, since a search needs the same few values often."""
    rows, log_choices = _log_choices(tokens)
    tiles = np.ceil(rows / tile)
    if chosen >= 1.0:
        return float(tiles[-1])
    log_mass = log_choices + rows * log(chosen) + (tokens - rows) * log1p(-chosen)
    return float(np.exp(log_mass) @ tiles)


@lru_cache(maxsize=4)
def _log_choices(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Row counts r from 1 to `tokens`, and the logarithm of the number of ways to choose r of the tokens."""
    rows = np.arange(1, tokens + 1)
    return rows, np.cumsum(np.log((tokens - rows + 1) / rows))


def _check(profile: Sequence[Number], num_experts: int) -> None:
    if len(profile) < num_experts:
        raise ConfigError(f"the routing profile has {len(profile)} loads, but a mixture has {num_experts} experts")
    if not all(is_number(load) and load > 0 for load in profile) or list(profile) != sorted(profile, reverse=True):
        raise ConfigError("the loads of a routing profile must be above 0 and descend")
