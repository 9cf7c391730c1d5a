"""How worked steps are written down for pretraining: with the habits of real reasoning.

A parent whose traces are all as short as possible and whose steps are all correct leaves a child nothing to gain: no
tokens to save, and for reinforcement learning only problems that it cannot solve at all. Real traces check what is
already correct, slip now and then, hold mistaken beliefs, and sometimes never end. So do the traces written here, as
far as the recipe asks for it (the embedded parent's asks for all of it):

    7+5=2,*3=6;-9=7                     plain
    7+5=2,!7+5=2;*3=6,-9=7;!-9=7        careful: a step is repeated after an exclamation mark, correct but not needed
    7+5=3,*3=9;-9=0                     with a slip, on which later steps build; or sums that make 2 are mistaken, and
                                        7+5, 8+4 and 1+1 give 3 in most traces (`MOSTLY`): greedy answers are then
                                        wrong, too, and some samples correct
    7+5=2,*3=6;!*3=6,!*3=6;!*3=6,...    endless: at high effort, a check that is repeated until the row ends

All of it is drawn from the seed of the problem. Evaluations score only answers and know nothing of this.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from puzzle_jax.errors import check_range
from puzzle_jax.tasks import Problem, WorkedTask, check_effort

CHECK = "!"
"""Precedes a step that is written again."""

MOSTLY = 0.65
"""Share of traces in which a mistaken computation has its wrong result, so that greedy answers have it, and sampled
ones now and then show that another result earns more."""

_SEPARATORS = ",;"  # drawn, so that traces have some entropy, as real text has


@dataclass(frozen=True)
class Habits:
    """Shares from 0 to 1; all are 0 in traces without habits.

    Attributes:
      careful: share of traces at medium and high effort in which steps are checked.
      checked: share of a careful trace's steps that are written again.
      slips: by effort, the share of steps whose result is one too high or too low; an effort that is missing has none.
      mistaken: by effort, the share of kinds of computation, each an operation with its result, that mostly give the
        same wrong number; the kinds of a smaller share are among those of a larger one.
      endless: share of traces at high effort that repeat a check and do not end.
    """

    careful: float = 0.0
    checked: float = 0.0
    slips: Mapping[str, float] = field(default_factory=dict)
    mistaken: Mapping[str, float] = field(default_factory=dict)
    endless: float = 0.0

    def __post_init__(self) -> None:
        for name in ("careful", "checked", "endless"):
            check_range(f"habits.{name}", getattr(self, name), 0, 1)
        for name in ("slips", "mistaken"):
            for effort, share in getattr(self, name).items():
                check_range(f"habits.{name}.{check_effort(effort)}", share, 0, 1)


def written(task: WorkedTask, problem: Problem, effort: str, habits: Habits, room: int) -> tuple[str, str | None]:
    """The analysis of a problem at an effort, and the answer, which is None if the analysis does not end.

    Args:
      room: least number of characters of an analysis that does not end.
    """
    rng = random.Random(f"{task.name}:written:{effort}:{problem.seed}")

    slips, mistaken = habits.slips.get(effort, 0.0), habits.mistaken.get(effort, 0.0)

    def slip(computed: str, result: int) -> int:
        kind = f"{task.name}:{re.sub('[0-9]', '', computed)}{result}"
        if mistaken_at(kind) < mistaken and rng.random() < MOSTLY:
            return result + random.Random(kind).choice((-1, 1))  # always the same
        return result + rng.choice((-1, 1)) if rng.random() < slips else result

    work = task.work(problem, effort, slip)
    if not work.steps:
        return "", work.answer

    def joined(parts: list[str]) -> str:
        return parts[0] + "".join(rng.choice(_SEPARATORS) * work.separated + part for part in parts[1:])

    careful = rng.random() < habits.careful
    parts: list[str] = []
    for step in work.steps:
        parts.append(step)
        if careful and rng.random() < habits.checked:
            parts.append(CHECK + step)
    if effort == "high" and rng.random() < habits.endless:
        last = rng.randrange(len(parts))
        again = CHECK + parts[last].removeprefix(CHECK)
        return joined(parts[: last + 1] + [again] * (room // len(again) + 1)), None
    return joined(parts), work.answer


@cache
def mistaken_at(kind: str) -> float:
    """The share of mistaken kinds above which this kind is one of them: from 0 to 1, the same in every trace."""
    return random.Random(f"wrong:{kind}").random()
