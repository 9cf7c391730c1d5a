"""Choosing among children by what a short distillation makes of them.

The KL of a child before training does not order children after it: experts that are missing cost much before and little
after, and what a layer no longer sees may be learnt elsewhere or not at all (docs/results.md, "Which windows training
can mend"). So children that differ where this matters are trained alike for a while, and the one with the lowest KL
then is chosen. They are

    the choice of the stage `solve`
    the best solution of every other pattern of layers that see less than in the parent, best predictions first
    where the target allows too few patterns, the pool's best with other expert counts

All are run whole on the validation traces before training, and again after it; errors of differences are paired by
trace. What was learnt is thrown away: distillation proper starts from the cut child.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.statistics import weighted_mean
from puzzle_jax.files import read_json, write_beside
from puzzle_jax.search.refine.accept import Difference
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.problem import Candidate

PerTrace = Float[np.ndarray, "traces"]
Train = Callable[[Candidate], PerTrace]
"""Trains a candidate and returns its KL per token on every validation trace."""


def reach(candidate: Candidate, parent: ModelConfig) -> tuple[bool, ...]:
    """By layer, whether it sees as far as the parent's."""
    return tuple(own.window == of.window for own, of in zip(candidate.blocks, parent.blocks, strict=True))


def contenders(
    pool: Sequence[Candidate], patterns: Sequence[Candidate], parent: ModelConfig, count: int
) -> list[Candidate]:
    """At most `count` candidates to train, as the module describes.

    Args:
      pool: the integer program's pool, its choice first, then those of which the lowest KL is expected.
      patterns: its best solution of each pattern, best first (`Problem.by_reach`).
    """
    found = [pool[0]]
    found += [other for other in patterns if reach(other, parent) != reach(pool[0], parent)]
    known = {candidate.blocks for candidate in found}
    for other in pool:
        if other.blocks not in known:
            found.append(other)
            known.add(other.blocks)
    return found[:count]


@dataclass(frozen=True)
class Contest:
    """Candidates before and after they were trained, on the same traces.

    Attributes:
      candidates: the finalists; the first is the choice without training.
      before: their KL before training.
      after: KL per token of each on every trace after training.
      steps: steps for which each was trained.
    """

    candidates: Sequence[Candidate]
    before: Measurements
    after: Float[np.ndarray, "candidates traces"]
    steps: int

    @property
    def kl(self) -> list[tuple[float, float]]:
        """Each finalist's KL after training, in nats per token, with its standard error over traces."""
        return [weighted_mean(of_one, self.before.tokens) for of_one in self.after]

    @property
    def chosen(self) -> int:
        """The finalist of lowest KL after training among those that keep the floors before it; of all, if none does."""
        order = [(bool(candidate.violated), kl) for candidate, (kl, _) in zip(self.candidates, self.kl, strict=True)]
        return min(range(len(order)), key=order.__getitem__)

    @property
    def above_chosen(self) -> list[Difference]:
        """By how much each finalist's KL after training exceeds the chosen one's, paired by trace."""
        return [Difference.between(one, self.after[self.chosen], self.before.tokens) for one in self.after]

    def to_json(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "steps": self.steps,
            "finalists": [
                {
                    **candidate.to_json(),
                    "before": asdict(score),
                    "after": {"kl": kl, "kl_se": error},
                    "above_chosen": asdict(above),
                }
                for candidate, score, (kl, error), above in zip(
                    self.candidates, self.before.scores, self.kl, self.above_chosen, strict=True
                )
            ],
        }

    def table(self) -> Table:
        """The finalists as a table: their layers, predicted KL, real KL before and after training, the choice."""
        table = Table(
            "experts, window", "predicted", "before", f"after {self.steps} steps", "above the chosen", "chosen"
        )
        rows = zip(self.candidates, self.before.scores, self.kl, self.above_chosen, strict=True)
        for number, (candidate, score, (kl, error), above) in enumerate(rows):
            layers = ", ".join(f"{block.num_experts} {block.window or 'full'}" for block in candidate.blocks)
            differs = "" if number == self.chosen else f"{above.mean:+.4f} ±{above.se:.4f}"
            of_child = f"{score.kl:.4f} ±{score.kl_se:.4f}", f"{kl:.4f} ±{error:.4f}"
            table.add_row(layers, f"{candidate.score:.4f}", *of_child, differs, "yes" if number == self.chosen else "")
        return table


def hold(candidates: Sequence[Candidate], before: Measurements, train: Train, steps: int, kept: Path) -> Contest:
    """Trains every candidate, or reads from `kept` what training it led to before the process was killed.

    Raises `PuzzleError` where training diverges.
    """
    after = []
    for number, candidate in enumerate(candidates, 1):
        file = kept / f"finalist-{_name(candidate)}.json"
        if file.is_file():
            after.append(np.array(read_json(file), np.float64))
            continue
        found = train(candidate)
        if not np.isfinite(found).all():
            raise PuzzleError(f"training finalist {number} diverged; lower finalists.learning_rate")
        kept.mkdir(exist_ok=True)
        write_beside(file, json.dumps(found.tolist()).encode())
        after.append(found)
    return Contest(candidates, before, np.stack(after), steps)


def _name(candidate: Candidate) -> str:
    layers = [[block.window, kept] for block, kept in zip(candidate.blocks, candidate.kept, strict=True)]
    return hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:16]
