"""Tasks: problems drawn by seed, and a score from 0 to 1 for an answer.

A task knows its problems and how to score an answer, but not how a model is prompted: `puzzle_jax.tasks.chat.chat`
turns a problem's prompt into tokens. Two kinds of task offer more: a `WorkedTask` writes worked solutions, on which the
embedded parent is pretrained and which no other stage may read; a `FiniteTask` has a fixed number of problems.
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
      seed: the seed that reproduces it.
      prompt: the user's message.
      answer: a correct text for the final channel; "" where the task knows none and checks answers by rule.
      details: measures of its difficulty (steps, digits, distance in tokens), by which accuracy is reported.
      entry: anything else that the task needs to score an answer. It follows from task and seed, so it is not compared.
      where: how messages refer to it ("my.jsonl, line 3"); by default task and seed. Not compared.
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
        """The name under which `get_task` finds the family."""
        ...

    @property
    def identity(self) -> str:
        """A text that two tasks share if all their problems and scores are equal, whatever their names."""
        ...

    @property
    def bounded(self) -> bool:
        """Returns whether scoring takes time at most proportional to the length of the texts. Other scorers run in
        processes of their own, with a time limit (`tasks.rewards.workers`)."""
        ...

    def sample(self, seed: int) -> Problem:
        """The problem of this seed; equal seeds give equal problems on every platform."""
        ...

    def score(self, problem: Problem, final_text: str) -> float:
        """The score of the final channel's text: 1 is correct, anything between 0 and 1 is partial credit."""
        ...


@dataclass(frozen=True)
class Work:
    """Worked steps that lead to an answer.

    Attributes:
      steps: texts of the steps; empty where the answer is given directly.
      answer: the text of the final channel that follows from these steps.
      separated: whether two steps need a separator between them.
    """

    steps: tuple[str, ...]
    answer: str
    separated: bool = True


Slip = Callable[[str, int], int]
"""Maps what a step computes (`7*3`) and its correct result to the result that is written, which later steps use."""


def no_slip(computed: str, result: int) -> int:
    """Returns the result unchanged: work without slips."""
    return result


@runtime_checkable
class WorkedTask(Task, Protocol):
    """A family that can also write out the work; pretraining uses only such tasks."""

    @property
    def level(self) -> str:
        """The key in `Problem.details` of the difficulty measure by which problems are drawn."""
        ...

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        """The worked steps of a problem at an effort, with every correct result passed through `slip`."""
        ...


@runtime_checkable
class FiniteTask(Task, Protocol):
    """A task with finitely many seeds: 0 to `size` - 1."""

    @property
    def size(self) -> int:
        """Number of problems."""
        ...


def check_effort(effort: str) -> str:
    """Returns `effort`; raises `ConfigError` unless it is one of `EFFORTS`."""
    check_choice("effort", effort, EFFORTS)
    return effort


def draw_level(rng: random.Random, least: int, most: int) -> int:
    """Draws a difficulty from `least` to `most`, easy ones more often: the share up to one grows as its square root.

    Low effort solves only the easy problems and high effort nearly all, so that every effort can both lose and gain.
    """
    u = rng.random()
    return least + int((most - least + 1) * (u * u))  # a product is rounded the same on every platform


def is_held_out(problem: Problem) -> bool:
    """Returns whether the problem belongs to the eighth of all prompts that pretraining never sees.

    The split hashes the prompt, not the seed, so that a small family cannot leak by drawing one prompt twice.
    """
    return zlib.crc32(problem.prompt.encode()) % _HELD_OUT_ONE_IN == 0


def problems(task: Task, first_seed: int = 0, held_out: bool = True) -> Iterator[Problem]:
    """Yields the task's problems from `first_seed` upwards, without end unless the task is finite.

    A worked task yields only those for which `is_held_out` equals `held_out`; other tasks, which were never pretrained
    on, yield all.

    Raises:
      ConfigError: when `first_seed` is negative.
    """
    check_range("first_seed", first_seed, 0)
    for seed in range(first_seed, task.size) if isinstance(task, FiniteTask) else count(first_seed):
        problem = task.sample(seed)
        if not isinstance(task, WorkedTask) or is_held_out(problem) == held_out:
            yield problem


class Embedded:
    """Base class of the embedded families, which are dataclasses of their settings and compare answers as text."""

    name: str

    @property
    def identity(self) -> str:
        return repr(self)

    @property
    def bounded(self) -> bool:
        return True

    def score(self, problem: Problem, final_text: str) -> float:
        """1 if the text is exactly the answer, apart from surrounding white space; else 0."""
        return float(final_text.strip() == problem.answer)

    def check(self, field: str, least: int, most: int) -> None:
        """Raises `ConfigError` unless 1 <= `least` <= `most`."""
        if not 1 <= least <= most:
            raise ConfigError(
                f"{self.name}: {field} range is {least} to {most}, but must satisfy 1 <= lowest <= highest"
            )
