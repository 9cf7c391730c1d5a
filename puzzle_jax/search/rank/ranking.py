"""Expert rankings by every rule, and the expert sets that they propose.

One pass over the traces gathers the statistics (`rank.statistics`) from which all rules score every expert of every
layer (`rank.rules`). No rule is best everywhere, so several propose experts to keep, and exact scores choose among the
distinct sets. Experts that no token was routed to rank last under every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.spec import Params
from puzzle_jax.search.rank.rows import PackedTraces
from puzzle_jax.search.rank.rules import PROPOSING, RULES
from puzzle_jax.search.rank.statistics import KeptSums, Statistics, gather_statistics
from puzzle_jax.search.space import ExpertChoice, Space, Windows, distinct_choices


class Ranking(NamedTuple):
    """Scores [layers, experts] by rule, where higher is better; and routed tokens per expert, by trace weight."""

    scores: Mapping[str, np.ndarray]
    routed: np.ndarray

    def keep(self, rule: str, layer: int, count: int) -> tuple[int, ...]:
        """Ids of the `count` best experts of a layer, ascending; equal scores go to the one routed to more often."""
        order = np.lexsort((-self.routed[layer], -self.scores[rule][layer]))
        return tuple(sorted(int(i) for i in order[:count]))

    def agreement(self, counts: Sequence[int]) -> dict[tuple[str, str], float]:
        """The share of kept experts that both rules of a pair keep, as the mean over layers and counts."""

        def shares(one: str, other: str) -> Iterator[float]:
            for layer in range(len(self.routed)):
                for count in counts:
                    yield len({*self.keep(one, layer, count)} & {*self.keep(other, layer, count)}) / count

        return {pair: float(np.mean(list(shares(*pair)))) for pair in combinations(self.scores, 2)}


def rank_by_rules(statistics: Statistics) -> Ranking:
    """Scores every expert by every rule."""
    routed = statistics.routed
    scores = {name: np.where(routed == 0, -np.inf, rule(statistics)) for name, rule in RULES.items()}
    return Ranking(scores, routed)


def rank_experts(
    params: Params,
    config: ModelConfig,
    batches: Sequence[PackedTraces],
    on_batch: Callable[[], None] | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    kept: KeptSums | None = None,
) -> Ranking:
    """Gathers statistics over batches and ranks by every rule; arguments as in `gather_statistics`."""
    return rank_by_rules(gather_statistics(params, config, batches, on_batch, seed, mesh, kept))


def ranked_space(
    parent: ModelConfig,
    counts: Sequence[Sequence[int]],
    windows: Windows,
    ranking: Ranking,
    rules: Sequence[str] = PROPOSING,
) -> Space:
    """The keep-set of every rule for every layer and count, equal ones merged; the parent's own set comes first if
    its count is offered."""
    layers = []
    for layer, (block, offered) in enumerate(zip(parent.blocks, counts, strict=True)):
        everything = ExpertChoice(block.num_experts, tuple(range(block.num_experts)), "parent")
        kept = [
            ExpertChoice(count, ranking.keep(rule, layer, count), rule)
            for count in offered
            if count < block.num_experts
            for rule in rules
        ]
        layers.append((*([everything] if block.num_experts in offered else []), *distinct_choices(kept)))
    return Space(parent, tuple(layers), windows)
