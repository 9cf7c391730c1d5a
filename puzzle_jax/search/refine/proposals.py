"""What refinement proposes: children by scores around the child before, children with swapped experts, and the proof
that either is better.

`search.refine.accept` decides with it. A swap changes which experts a layer keeps and not how many, so it costs nothing
and no limit of the target is affected. In every layer the swap that lowers the child's KL most on the calibration
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

from puzzle_jax.search.refine.accept import Difference, Pool, Swap, swapped, together
from puzzle_jax.search.score.alternatives import expert_mask
from puzzle_jax.search.score.measurements import SavedTable, ScoreTable
from puzzle_jax.search.score.replace_one import Alternative
from puzzle_jax.search.score.space_scorer import SpaceScorer
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate, Scores
from puzzle_jax.search.space import ExpertChoice, Space


@dataclass(frozen=True)
class Refinement:
    """Proposals around children of one search, and comparisons between them.

    Attributes:
      space: the alternatives that have been scored around the parent.
      removal_error: error that the removal of each of the parent's experts causes, by which swaps are proposed.
      swaps: experts tried on either side of a swap.
      scorer: scores alternatives around a child.
      pool: the program's solutions for the scores of a space, run whole on the validation traces.
      measure: KL of candidates on a set of traces, by the set's name.
      table: file of the scores around a child.
      kept: directory of a killed run's results.
      identity: what scores depend on besides the child, alternatives and traces.
    """

    space: Space
    removal_error: Float[np.ndarray, "layers experts"]
    swaps: int
    scorer: Callable[[Candidate], SpaceScorer]
    pool: Callable[[Space, Scores], Pool]
    measure: Callable[[Sequence[Candidate], str], Measurements]
    table: Path
    kept: Path
    identity: str

    def rescored(self, child: Candidate) -> Pool:
        """The pool of the program with the scores around a child."""
        scored = self.scorer(child)(self.space, self.table, self._around(child))
        pool = self.pool(scored.space, scored.scores)
        # Changes that each help alone overlap, so that their sum may promise more than there is.
        return replace(pool, candidates=[replace(c, score=max(0.0, child.score + c.score)) for c in pool.candidates])

    def swapped(self, child: Candidate) -> Pool | None:
        """Children that keep other experts in one or more layers, run whole on the validation traces; None where no
        swap helps on the calibration traces."""
        proposals = together(child, self._best_swaps(child))
        return Pool(proposals, *self.measure(proposals, "validation")) if proposals else None

    def confirm(self, new: Candidate, old: Candidate) -> tuple[Difference, Difference]:
        """How a proposal's KL differs from that of the child before, on validation and on confirmation traces."""

        def difference(name: str) -> Difference:
            found = self.measure([new, old], name)
            return Difference.between(found.kl[0], found.kl[1], found.tokens)

        return difference("validation"), difference("confirmation")

    def _best_swaps(self, child: Candidate) -> list[Swap]:
        """The swap of every layer that lowers the child's KL most, where one does; the most helpful layer first."""
        options = [
            (layer, option)
            for layer, choice in enumerate(child.choices)
            for option in swapped(choice, self.removal_error[layer], self.swaps)
        ]
        best: dict[int, Swap] = {}
        for (layer, option), gain in zip(options, self._gains(child, options), strict=True):
            if gain < min(0.0, best[layer].gain if layer in best else 0.0):
                best[layer] = Swap(layer, option, gain)
        return sorted(best.values(), key=lambda swap: swap.gain)

    def _gains(self, child: Candidate, options: Sequence[tuple[int, ExpertChoice]]) -> list[float]:
        """By how much each swap alone changes the child's KL on the calibration traces."""
        if not options:
            return []
        experts = self.removal_error.shape[1]
        alternatives = [
            (layer, Alternative(expert_mask(option, experts), child.blocks[layer].window)) for layer, option in options
        ]
        scorer = self.scorer(child)
        table = ScoreTable.empty(alternatives, scorer.traces)
        identity = self._around(child)
        name = hashlib.sha256(table.key(identity).encode()).hexdigest()[:16]
        saved = SavedTable(table, self.kept / f"swaps-{name}.safetensors", identity)
        scorer.fill(table, range(len(options)), range(len(scorer.traces)), save=saved.save)
        saved.save(now=True)
        return [float(mean) for mean in np.asarray(table.means())]

    def _around(self, child: Candidate) -> str:
        """What scores around a child depend on besides alternatives and traces."""
        return f"{self.identity} {json.dumps(child.to_json()['layers'])}"
