"""What refinement asks of a search: alternatives scored around a child, swaps of experts, and the proof of either.

`search.refine.accept` decides with it. A swap changes which experts a layer keeps and not how many, so it costs nothing
and no limit of the target moves. Of every layer the swap that lowers the child's KL most on the calibration traces is
found by exact scores; the best one alone, the best two, four and so on up to all of them together are children to try,
since what helps alone need not help together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from puzzle_jax.search.refine.accept import Difference, Pool, Swap, swapped, together
from puzzle_jax.search.score.alternatives import expert_mask
from puzzle_jax.search.score.measurements import KeptBook, ScoreBook
from puzzle_jax.search.score.replace_one import Alternative
from puzzle_jax.search.solve.problem import Candidate
from puzzle_jax.search.space import ExpertChoice, Space

if TYPE_CHECKING:
    from puzzle_jax.search.pipeline import Search


@dataclass(frozen=True)
class Refinement:
    """Proposals around children of one search, and how they compare.

    Attributes:
      search: whose stages up to the program are done.
    """

    search: Search

    def rescored(self, child: Candidate) -> Pool:
        """The pool of the program whose scores are taken around a child."""
        search = self.search
        space = Space.from_json(search.parent.config, search.scored_layers())
        book = search.run / "refine-book.safetensors"
        scored = search.scorer(search.child(child))(space, book, self._identity(child))
        pool = search.pool(search.problem_of(scored.space, scored.scores))
        # Changes that each help alone overlap, so that their sum may promise more than there is.
        return replace(pool, candidates=[replace(c, score=max(0.0, child.score + c.score)) for c in pool.candidates])

    def swapped(self, child: Candidate) -> Pool | None:
        """Children that keep other experts in one or more layers, run whole on the validation traces; None where no
        swap helps on the traces that score."""
        proposals = together(child, self._best_swaps(child))
        return self.search.measured_pool(proposals) if proposals else None

    def confirm(self, new: Candidate, old: Candidate) -> tuple[Difference, Difference]:
        """How a proposal's KL differs from that of the child before, on validation and on confirmation traces."""
        pair = [self.search.child(new), self.search.child(old)]

        def difference(split: str) -> Difference:
            found = self.search.measure(pair, split)
            return Difference.between(found.kl[0], found.kl[1], found.tokens)

        return difference("validation"), difference("confirmation")

    def _best_swaps(self, child: Candidate) -> list[Swap]:
        """Of every layer the swap that lowers the child's KL most, where one does; the most helpful layer first."""
        removal = self.search.ranking.scores["removal_error"]
        options = [
            (layer, option)
            for layer, choice in enumerate(child.choices)
            for option in swapped(choice, removal[layer], self.search.recipe.refine.swaps)
        ]
        best: dict[int, Swap] = {}
        for (layer, option), gain in zip(options, self._gains(child, options), strict=True):
            if gain < min(0.0, best[layer].gain if layer in best else 0.0):
                best[layer] = Swap(layer, option, gain)
        return sorted(best.values(), key=lambda swap: swap.gain)

    def _identity(self, child: Candidate) -> str:
        """What scores around a child depend on besides alternatives and traces."""
        return f"{self.search.identity} {json.dumps(child.to_json()['layers'])} {self.search.recipe.child}"

    def _gains(self, child: Candidate, options: Sequence[tuple[int, ExpertChoice]]) -> list[float]:
        """By how much each swap alone changes the child's KL on the calibration traces."""
        if not options:
            return []
        experts = [block.num_experts for block in self.search.parent.config.blocks]
        alternatives = [
            (layer, Alternative(expert_mask(option, experts[layer]), child.blocks[layer].window))
            for layer, option in options
        ]
        scorer = self.search.scorer(self.search.child(child))
        book = ScoreBook.empty(alternatives, scorer.traces)
        identity = self._identity(child)
        name = hashlib.sha256(book.key(identity).encode()).hexdigest()[:16]
        kept = KeptBook(book, self.search.kept / f"swaps-{name}.safetensors", identity)
        scorer.fill(book, range(len(options)), range(len(scorer.traces)), save=kept.save)
        kept.save(now=True)
        return [float(mean) for mean in np.asarray(book.means())]
