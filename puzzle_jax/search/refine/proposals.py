"""Proposals of refinement: children by scores around the child before, children with swapped experts, and the
measurements that confirm either.

`search.refine.accept` decides by them. A swap changes which experts a layer keeps but not how many, so costs stay the
same and no limit on costs is affected. In every layer the swap that lowers the child's KL most on the calibration
traces is found by exact scores. The best one alone, the best two, four and so on up to all of them together are tried,
since swaps that help alone need not help together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float

from puzzle_jax.processes.published import values_of
from puzzle_jax.search.refine.accept import Difference, Pool, Swap, swapped, together
from puzzle_jax.search.score.adaptive import in_random_order
from puzzle_jax.search.score.alternatives import expert_mask
from puzzle_jax.search.score.measurements import SavedTable, ScoreTable
from puzzle_jax.search.score.replace_one import Alternative
from puzzle_jax.search.score.space_scorer import SpaceScorer
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.floors import MeasuredFloors
from puzzle_jax.search.solve.problem import Candidate, Scores
from puzzle_jax.search.space import ExpertChoice, Space


@dataclass(frozen=True)
class Refinement:
    """Proposals around children of one search, and comparisons between them.

    Attributes:
      space: the alternatives that have been scored around the parent.
      removal_error: error caused by removing each of the parent's experts, by which swaps are proposed.
      swaps: experts tried on either side of a swap.
      scorer: makes the scorer of alternatives around a child.
      pool: returns the integer program's solutions for a space and its scores around a child, run whole on the
        validation traces.
      measure: returns the KL of candidates on a set of traces, given by name.
      table: file of the scores around a child.
      kept: directory of a killed run's results.
      identity: everything that scores depend on besides the child, alternatives and traces.
      floors: returns the limits on the KL of groups as they are checked on a set of traces, given by name; None without
        any.
      values: returns every expert's value around a child, by which swaps are proposed in place of the removal error.
    """

    space: Space
    removal_error: Float[np.ndarray, "layers experts"]
    swaps: int
    scorer: Callable[[Candidate], SpaceScorer]
    pool: Callable[[Space, Scores, Candidate], Pool]
    measure: Callable[[Sequence[Candidate], str], Measurements]
    table: Path
    kept: Path
    identity: str
    floors: Callable[[str], MeasuredFloors | None] = lambda name: None
    values: Callable[[Candidate], Float[np.ndarray, "layers experts"]] | None = None

    def rescored(self, child: Candidate) -> Pool:
        """The integer program's pool with the scores around a child."""
        scored = self.scorer(child)(self.space, self.table, self._around(child))
        pool = self.pool(scored.space, scored.scores, child)
        # The gains of changes that help alone overlap, so their sum may exceed the child's whole KL.
        return replace(pool, candidates=[replace(c, score=max(0.0, child.score + c.score)) for c in pool.candidates])

    def swapped(self, child: Candidate) -> Pool | None:
        """Children that keep other experts in one or more layers, run whole on the validation traces; None if no swap
        helps on the calibration traces."""
        proposals = together(child, self._best_swaps(child))
        if not proposals:
            return None
        return Pool.measured(proposals, self.measure(proposals, "validation"), self.floors("validation"))

    def confirm(self, new: Candidate, old: Candidate) -> tuple[Difference, Difference]:
        """Differences of a proposal's KL from that of the child before, on validation and on confirmation traces."""

        def difference(name: str) -> Difference:
            found = self.measure([new, old], name)
            return Difference.between(found.kl[0], found.kl[1], found.tokens)

        return difference("validation"), difference("confirmation")

    def breaks(self, new: Candidate, old: Candidate) -> tuple[str, ...]:
        """The floors, in words, that held for the child before and do not for a proposal, on validation or on
        confirmation traces."""
        broken: list[str] = []
        for name in ("validation", "confirmation"):
            floors = self.floors(name)
            if floors is not None:
                broken += floors.broken(*self.measure([new, old], name).kl)
        return tuple(broken)

    def _best_swaps(self, child: Candidate) -> list[Swap]:
        """For every layer in which one helps, the swap that lowers the child's KL most; the most helpful swap first."""
        values = self.removal_error if self.values is None else self.values(child)
        options = [
            (layer, option)
            for layer, choice in enumerate(child.choices)
            for option in swapped(choice, values[layer], self.swaps)
        ]
        best: dict[int, Swap] = {}
        for number, gain in self._gains(child, options).items():
            layer, option = options[number]
            if gain < min(0.0, best[layer].gain if layer in best else 0.0):
                best[layer] = Swap(layer, option, gain)
        return sorted(best.values(), key=lambda swap: swap.gain)

    def _gains(self, child: Candidate, options: Sequence[tuple[int, ExpertChoice]]) -> dict[int, float]:
        """The change of the child's KL on calibration traces by each swap alone, by the swap's number.

        Works by successive elimination: all swaps are scored on a few traces, then the best quarter in every layer on
        twice as many, until one per layer is left; their joint effect is measured later in any case. The exact method
        scores all swaps on all traces.
        """
        if not options:
            return {}
        experts = self.removal_error.shape[1]
        alternatives = [
            (layer, Alternative(expert_mask(option, experts), child.blocks[layer].window)) for layer, option in options
        ]
        scorer, identity = self.scorer(child), self._around(child)
        table = ScoreTable.empty(alternatives, scorer.traces, scorer.weigh)
        name = hashlib.sha256(table.key(identity).encode()).hexdigest()[:16]
        saved = SavedTable(table, self.kept / f"swaps-{name}.safetensors", identity)
        order, left = in_random_order(scorer.traces, scorer.seed), list(range(len(options)))
        start, stop = 0, len(order) if scorer.settings.method == "exact" else min(scorer.settings.first, len(order))
        while True:
            scorer.fill(table, left, order[start:stop], save=saved.save)
            saved.save(now=True)
            gains = values_of(table.means())
            best = _best_quarter(left, gains, [layer for layer, _ in options])
            if stop == len(order) or len(best) == len(left):
                return {number: float(gains[number]) for number in left}
            left = best
            start, stop = stop, min(2 * stop, len(order))

    def _around(self, child: Candidate) -> str:
        """Identifies what scores around a child depend on besides alternatives and traces."""
        return f"{self.identity} {json.dumps(child.to_json()['layers'])}"


def _best_quarter(numbers: Sequence[int], gains: Float[np.ndarray, "options"], layer: Sequence[int]) -> list[int]:
    """Returns the best quarter of every layer's options, but at least one."""
    left = []
    for each in sorted({layer[number] for number in numbers}):
        own = sorted((number for number in numbers if layer[number] == each), key=lambda number: gains[number])
        left += own[: max(1, len(own) // 4)]
    return sorted(left)
