"""The space that a ranking proposes: for every layer and expert count, the experts that each method would keep."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_jax.config import ModelConfig
from puzzle_jax.search.rank.ranking import METHODS, Ranking
from puzzle_jax.search.space import ExpertChoice, Space, Windows, distinct_choices


def ranked_space(
    parent: ModelConfig,
    counts: Sequence[Sequence[int]],
    windows: Windows,
    ranking: Ranking,
) -> Space:
    """The keep-set of every method for every count; the parent's own set comes first where its count is offered, and
    equal sets are merged.

    Args:
      parent: the parent's configuration.
      counts: expert counts that each layer offers.
      windows: windows that each layer offers.
      ranking: scores of the parent's experts.
    """
    layers = []
    for layer, (block, offered) in enumerate(zip(parent.blocks, counts, strict=True)):
        everything = ExpertChoice(block.num_experts, tuple(range(block.num_experts)), "parent")
        kept = [
            ExpertChoice(count, ranking.keep(method, layer, count), method)
            for count in offered
            if count < block.num_experts
            for method in METHODS
        ]
        layers.append((*([everything] if block.num_experts in offered else []), *distinct_choices(kept)))
    return Space(parent, tuple(layers), windows)
