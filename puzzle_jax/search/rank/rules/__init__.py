"""Ranking rules: each scores every expert of every layer from the same statistics; a higher score means keep.

A rule is a module with one function, `score(statistics) -> [layers, experts]`, and its source in the docstring. To add
one, write such a module and list it in `RULES`; `python benchmarks/rankings.py` then ranks it beside the others
(docs/rankings.md). Experts that no token was routed to rank last under every rule, whatever it says of them.
"""

from __future__ import annotations

from collections.abc import Callable

from puzzle_jax.search.rank.rules import (
    activation_norm,
    easy_ep,
    frequency,
    hope,
    joint_greedy,
    random_order,
    ranked_choice,
    reap,
    reap_by_token,
    removal_error,
    squared_activation_norm,
    summed_norm,
    weighted_frequency,
)
from puzzle_jax.search.rank.statistics import ByExpert, Statistics

Rule = Callable[[Statistics], ByExpert]
"""Scores [layers, experts], where higher is better, from the statistics of a pass over the traces."""

RULES: dict[str, Rule] = {
    "removal_error": removal_error.score,
    "joint_greedy": joint_greedy.score,
    "reap": reap.score,
    "reap_by_token": reap_by_token.score,
    "hope": hope.score,
    "easy_ep": easy_ep.score,
    "activation_norm": activation_norm.score,
    "squared_activation_norm": squared_activation_norm.score,
    "summed_norm": summed_norm.score,
    "frequency": frequency.score,
    "weighted_frequency": weighted_frequency.score,
    "ranked_choice": ranked_choice.score,
    "random": random_order.score,
}
"""Every rule by name."""

PROPOSING = (
    "removal_error",
    "joint_greedy",
    "reap",
    "easy_ep",
    "frequency",
    "weighted_frequency",
    "ranked_choice",
)
"""Rules whose expert sets a search scores unless `rank.rules` names others."""
