"""Tasks: problems drawn by seed, and a score from 0 to 1 for an answer.

A task is everything that reasoning needs and nothing of how a model is asked: `puzzle_jax.tasks.chat.chat` turns a
problem's prompt into tokens. Two kinds of task know more: a `WorkedTask` writes worked traces, texts to pretrain the
embedded parent on, which no other stage may read; a `FiniteTask` has so many problems and no more.
Left out: conversations of several turns, and answers that need tools.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from puzzle_jax.config import EFFORTS
from puzzle_jax.errors import ConfigError, check_choice, check_range

_HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Problem:
    """One question and its answer.

    Attributes:
      task: name of the task it was drawn from.
      seed: the seed that draws it again.
      prompt: the user's message.
      answer: a text of the final channel that is right; "" where the task knows none and checks answers by rule.
      details: measures of its difficulty (steps, digits, distance in tokens), to report accuracy by.
      entry: anything else that the task needs to score an answer. It follows from task and seed, so it is not compared.
      where: the place that messages name ("my.jsonl, line 3"); by default task and seed. Not compared.
    """

    task: str
    seed: int
    prompt: str
    answer: str
    details: Mapping[str, int] = field(default_factory=dict)
    entry: Any = field(default=None, compare=False, repr=False)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))
        object.__setattr__(self, "where", self.where or f"task {self.task}, problem {self.seed}")

    def __reduce__(self):
        # A mappingproxy cannot be pickled, and problems travel to worker processes.
        return (Problem, (self.task, self.seed, self.prompt, self.answer, dict(self.details), self.entry, self.where))


@runtime_checkable
class Task(Protocol):
    """A family of problems."""

    @property
    def name(self) -> str:
        """The name that `get_task` knows the family by."""
        ...

    @property
    def identity(self) -> str:
        """A text that is equal for two tasks if all their problems and scores are, whatever their names."""
        ...

    @property
    def bounded(self) -> bool:
        """Returns whether scoring takes no more than time in proportion to the texts. Other scorers run in processes of
        their own, with a time limit (`tasks.rewards.workers`)."""
        ...

    def sample(self, seed: int) -> Problem:
        """The problem of this seed; equal seeds give equal problems on every platform."""
        ...

    def score(self, problem: Problem, final_text: str) -> float:
        """The score of the text of the final channel: 1 is right, anything between 0 and 1 is partial credit."""
        ...


@dataclass(frozen=True)
class Work:
    """Worked steps that lead to an answer.

    Attributes:
      steps: texts of the steps; none where the answer is given at once.
      answer: the text of the final channel that follows from these steps.
      separated: whether something has to stand between two steps.
    """

    steps: tuple[str, ...]
    answer: str
    separated: bool = True


Slip = Callable[[str, int], int]
"""From what a step computes (`7*3`) and its right result to the result that is written, which later ones go on from."""


def no_slip(computed: str, result: int) -> int:
    """The result itself: work without a slip."""
    return result


@runtime_checkable
class WorkedTask(Task, Protocol):
    """A family that can also write out the work: only such tasks are pretrained on."""

    @property
    def level(self) -> str:
        """The name of the measure of difficulty, of those in `Problem.details`, that problems are drawn by."""
        ...

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        """The worked steps of a problem at an effort, with the results that `slip` makes of the right ones."""
        ...


@runtime_checkable
class FiniteTask(Task, Protocol):
    """A task whose seeds end: 0 to `size` - 1."""

    @property
    def size(self) -> int:
        """Number of problems."""
        ...


def check_effort(effort: str) -> str:
    """`effort` itself; raises `ConfigError` unless it is one of `EFFORTS`."""
    check_choice("effort", effort, EFFORTS)
    return effort


def draw_level(rng: random.Random, least: int, most: int) -> int:
    """A difficulty of `least` to `most`, easy ones more often: the share up to a level grows as its square root.

    Low effort can only do the easy ones, high effort nearly all: so every effort has something to lose and to win.
    """
    u = rng.random()
    return least + int((most - least + 1) * (u * u))  # a product is rounded alike on every platform


def is_held_out(problem: Problem) -> bool:
    """Returns whether the problem belongs to the eighth of all prompts that pretraining never sees.

    The split hashes the prompt, not the seed, so that a small family cannot leak by drawing one prompt twice.
    """
    return zlib.crc32(problem.prompt.encode()) % _HELD_OUT_ONE_IN == 0


def problems(task: Task, first_seed: int = 0, held_out: bool = True) -> Iterator[Problem]:
    """The task's problems from `first_seed` upwards: endless, or up to the last one of a finite task.

    A worked task gives only those on one side of `is_held_out`; other tasks, which were never pretrained on, give all.

    Raises:
      ConfigError: when `first_seed` is negative.
    """
    check_range("first_seed", first_seed, 0)
    for seed in range(first_seed, task.size) if isinstance(task, FiniteTask) else count(first_seed):
        problem = task.sample(seed)
        if not isinstance(task, WorkedTask) or is_held_out(problem) == held_out:
            yield problem


class Embedded:
    """Base of the embedded families: dataclasses of their settings, whose answers are compared as text."""

    name: str

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def bounded(self) -> bool:
        return True

    def score(self, problem: Problem, final_text: str) -> float:
        """1 for exactly the answer, surrounding white space aside; else 0."""
        return float(final_text.strip() == problem.answer)

    def check(self, field: str, least: int, most: int) -> None:
        """Raises `ConfigError` for a range of levels that is empty."""
        if not 1 <= least <= most:
            raise ConfigError(
                f"{self.name}: {field} range is {least} to {most}, but must satisfy 1 <= lowest <= highest"
            )
