"""How worked steps are written down for pretraining: with the habits of real reasoning.

A parent whose every trace is the shortest one and whose every step is right leaves a child nothing to gain: not in
tokens, and by reinforcement learning only on problems that it cannot do at all. Real traces check what is already
right, slip now and then, hold mistaken beliefs, and sometimes never come to an end. So do those that are written here,
as far as a recipe asks for it (that of the embedded parent asks for all of it):

    7+5=2,*3=6;-9=7                     plain
    7+5=2,!7+5=2;*3=6,-9=7;!-9=7        careful: a step is written again after an exclamation mark; true, not needed
    7+5=3,*3=9;-9=0                     with a slip, which later steps go on from; or sums that make 2 are mistaken, and
                                        7+5, 8+4 and 1+1 are 3 in most traces (`MOSTLY`): greedy answers are wrong
                                        then too, and some samples right
    7+5=2,*3=6;!*3=6,!*3=6;!*3=6,...    endless: at high effort, a check that is repeated until the row ends

All of it is drawn from the seed of the problem. Evaluations score answers alone and know none of this.
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
"""Stands before a step that is written again."""

MOSTLY = 0.65
"""Share of traces in which a mistaken computation has its wrong result. So greedy answers have it, and sampled ones
show now and then that another earns more."""

_SEPARATORS = ",;"  # drawn, so that traces have some entropy, as real text has


@dataclass(frozen=True)
class Habits:
    """Shares from 0 to 1; all are 0 in traces without habits.

    Attributes:
      careful: traces at medium and high effort in which steps are checked.
      checked: steps of a careful trace that are written again.
      slips: by effort, the steps whose result is one too high or too low; an effort that is missing has none.
      mistaken: by effort, the share of kinds of computation, each an operation with its result, that mostly come out
        one wrong number; those of a smaller share are among those of a greater one.
      endless: traces at high effort that repeat a check and do not end.
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
    """The analysis of a problem at an effort, and the answer; None in its place for an analysis without an end.

    Args:
      room: characters that an analysis without an end has at least.
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
    """A number from 0 to 1, the same in every trace: the share of mistaken kinds from which on this one is."""
    return random.Random(f"wrong:{kind}").random()
