"""Choice of the next problem and its effort: tasks and efforts are mixed by weight, and problems are asked only where
there is something to learn.

A group of answers that all pass or all fail gives no signal. So running pass rates are kept, and problems whose
pass rate is out of bounds are passed over (the paper's filter; DAPO, arXiv 2503.14476, drops such groups after asking).
A row of a finite task recurs, and has a pass rate of its own at every effort. A problem of an endless family does not
recur, so problems of one task and effort share a rate if they are equally hard by the first of their details (steps,
digits). Rates follow the policy, since older answers count less. Now and then a problem is asked whatever its rate, so
that one which has become learnable is found again. Problems that are too long are passed over as well, and counted.

All choices are determined by the seed and by earlier answers, whose counts are in the state; a resumed run asks what an
uninterrupted one would. Left out: hand-written curricula.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from puzzle_jax.errors import MOST_TOGETHER, ConfigError, PuzzleError, check_range
from puzzle_jax.evaluate.accuracy import SEED_STRIDE, SPLIT_STRIDE, SPLITS, QuestionSet
from puzzle_jax.tasks import EFFORTS, TASKS, FiniteTask, Problem, check_effort, get_task, problems

_SPLIT = len(SPLITS)  # endless families: beyond the seeds of every split
_ROWS_SPLIT = "training"  # finite tasks: the rows that distillation also asks
_CANDIDATES = 64
_GROUPS_REMEMBERED = 10


@dataclass(frozen=True)
class PromptSettings:
    """Settings of the choice of prompts.

    Attributes:
      tasks: weight of each task, by the names of `get_task`; empty means the embedded families with equal weights.
      efforts: weight of each effort.
      prompts: number of prompts asked per step.
      min_pass_rate, max_pass_rate: inclusive bounds of the running pass rate of problems that are asked.
      min_answers: number of answers that a pass rate needs; problems with fewer are always asked.
      explore: share of prompts that are asked whatever their pass rate.
      seed: random seed of the problems and their order.
    """

    tasks: Mapping[str, float] = field(default_factory=dict)
    efforts: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(EFFORTS, 1.0))
    prompts: int = 16
    min_pass_rate: float = 0.1
    max_pass_rate: float = 0.9
    min_answers: int = 16
    explore: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for effort in self.efforts:
            check_effort(effort)
        for name in ("tasks", "efforts"):
            for key, weight in getattr(self, name).items():
                check_range(f"prompts.{name}.{key}", weight, 0, above=True)
        if not self.efforts:
            raise ConfigError(f"prompts.efforts is empty, but must hold at least one of {', '.join(EFFORTS)}")
        for name in ("prompts", "min_answers"):
            check_range(f"prompts.{name}", getattr(self, name), 1, MOST_TOGETHER)
        if not 0 <= self.min_pass_rate < self.max_pass_rate <= 1:
            raise ConfigError(
                f"prompts.min_pass_rate is {self.min_pass_rate} and prompts.max_pass_rate {self.max_pass_rate}, but "
                "must be from 0 to 1, the first below the second"
            )
        check_range("prompts.explore", self.explore, 0, 1)
        check_range("prompts.seed", self.seed, 0, SPLIT_STRIDE // SEED_STRIDE - 1)

    @property
    def task_weights(self) -> Mapping[str, float]:
        return self.tasks or dict.fromkeys(TASKS, 1.0)


class Prompt(NamedTuple):
    """A problem and the effort it is asked at."""

    problem: Problem
    effort: str


class NothingToAsk(PuzzleError):
    """No task has a problem left that is short enough and whose pass rate is within bounds."""


class Prompts:
    """The stream of prompts, one list per step; `record` adds the outcomes of their answers.

    Attributes:
      too_long: how often a problem was passed over because it is too long.
      first_too_long: the first such prompt that this process met.

    Args:
      settings: settings of the choice.
      fits: whether a prompt is short enough; others are passed over.

    Raises ConfigError for unknown tasks, and for a finite task without rows.
    """

    def __init__(self, settings: PromptSettings, fits: Callable[[Prompt], bool] = lambda prompt: True) -> None:
        self.settings, self._fits = settings, fits
        self._tasks = {name: get_task(name) for name in settings.task_weights}
        self._rows = {name: _rows(name, settings) for name, task in self._tasks.items() if isinstance(task, FiniteTask)}
        self._streams: dict[str, Iterator[Problem]] = {}
        self._drawn = 0
        self._next = {name: 0 if name in self._rows else _first_seed(settings) for name in self._tasks}
        self._rates: dict[str, tuple[float, float]] = {}  # key -> (answers, passed ones), both discounted
        self.too_long = 0
        self.first_too_long: Prompt | None = None

    def __next__(self) -> list[Prompt]:
        return self.draw(self.settings.prompts)

    def draw(self, count: int) -> list[Prompt]:
        """Draws the next prompts.

        Raises NothingToAsk when no task has a problem left whose pass rate is within bounds.
        """
        return [self._one() for _ in range(count)]

    def record(self, prompt: Prompt, answers: int, passed: int) -> None:
        """Adds a number of answers to a prompt, and how many of them passed, to its running pass rate."""
        if not answers:
            return
        before, passed_before = self._rates.get(self._key(prompt), (0.0, 0.0))
        fade = 1 - 1 / _GROUPS_REMEMBERED
        self._rates[self._key(prompt)] = before * fade + answers, passed_before * fade + passed

    def pass_rate(self, prompt: Prompt) -> float | None:
        """The running share of answers that pass; None before there are enough answers."""
        answers, passed = self._rates.get(self._key(prompt), (0.0, 0.0))
        return passed / answers if answers >= self.settings.min_answers else None

    def without_signal(self) -> dict[tuple[str, str], float]:
        """Tasks and efforts whose pass rates are all out of bounds, with their mean, once they have enough answers."""
        by_pair: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for key, rate in self._rates.items():
            effort, _, rest = key.partition(" ")
            by_pair.setdefault((rest.rpartition(" ")[0], effort), []).append(rate)
        found = {}
        for pair, rates in by_pair.items():
            known = [passed / answers for answers, passed in rates if answers >= self.settings.min_answers]
            enough = sum(answers for answers, _ in rates) >= _GROUPS_REMEMBERED * self.settings.min_answers
            if enough and known and not any(map(self._within, known)):
                found[pair] = sum(known) / len(known)
        return found

    def get_state(self) -> dict[str, object]:
        rates = {key: list(rate) for key, rate in self._rates.items()}
        return {"drawn": self._drawn, "next": self._next, "rates": rates, "too_long": self.too_long}

    def set_state(self, state: Any, /) -> None:
        self._drawn, self._next = state["drawn"], dict(state["next"])
        self._rates = {key: (answers, passed) for key, (answers, passed) in state["rates"].items()}
        self.too_long = state.get("too_long", 0)
        self._streams = {}

    def _one(self) -> Prompt:
        """Draws a task and effort by weight, then a problem; where `_CANDIDATES` are unsuitable, takes another pair."""
        settings = self.settings
        rng = random.Random(f"prompts:{settings.seed}:{self._drawn}")
        self._drawn += 1
        explores = rng.random() < settings.explore
        pairs = {
            (task, effort): of_task * of_effort
            for task, of_task in settings.task_weights.items()
            for effort, of_effort in settings.efforts.items()
        }
        while pairs:
            (pair,) = rng.choices(list(pairs), list(pairs.values()))
            for _ in range(_CANDIDATES):
                prompt = Prompt(self._following(pair[0]), pair[1])
                if not self._fits(prompt):
                    self.too_long += 1
                    self.first_too_long = self.first_too_long or prompt
                    continue
                rate = self.pass_rate(prompt)
                if explores or rate is None or self._within(rate):
                    return prompt
            del pairs[pair]
        raise NothingToAsk(
            f"none of {_CANDIDATES} problems of any task and effort is short enough and has a pass rate from "
            f"{settings.min_pass_rate} to {settings.max_pass_rate}: there is nothing to learn from "
            f"{', '.join(settings.task_weights)}; name other tasks, or wider bounds"
        )

    def _within(self, rate: float) -> bool:
        return self.settings.min_pass_rate <= rate <= self.settings.max_pass_rate

    def _following(self, name: str) -> Problem:
        """The task's next problem; rows of a finite task repeat without end, in a new order each time."""
        if name in self._rows:
            rows, at = self._rows[name], self._next[name]
            self._next[name] += 1
            order = list(range(len(rows)))
            random.Random(f"rows:{self.settings.seed}:{at // len(rows)}").shuffle(order)
            return rows[order[at % len(rows)]]
        if name not in self._streams:
            self._streams[name] = problems(self._tasks[name], first_seed=self._next[name], held_out=False)
        problem = next(self._streams[name])
        self._next[name] = problem.seed + 1
        return problem

    def _key(self, prompt: Prompt) -> str:
        """Key that a prompt's pass rate is kept under: "EFFORT TASK LEVEL"."""
        problem = prompt.problem
        level = problem.seed if problem.task in self._rows else next(iter(problem.details.values()), 0)
        return f"{prompt.effort} {problem.task} {level}"


def _first_seed(settings: PromptSettings) -> int:
    return _SPLIT * SPLIT_STRIDE + settings.seed * SEED_STRIDE


def _rows(name: str, settings: PromptSettings) -> list[Problem]:
    questions = QuestionSet((name,), (EFFORTS[0],), per_task=2**31, split=_ROWS_SPLIT, seed=settings.seed)
    return [problem for problem, _ in questions.questions()]
