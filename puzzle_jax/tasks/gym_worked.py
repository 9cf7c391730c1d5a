"""Families of reasoning-gym with worked solutions, on which a small parent can be pretrained.

Problems, answers and scores are the library's own (`puzzle_jax.tasks.gym`), at its default difficulty; only the written
steps are ours. An eighth of the problems, by a hash of their prompt, is held out from pretraining, and only those are
drawn for anything else. Families:

    letter_counting  of "e" in "be red ere": `be1`, `re2d`, `e3re4`; medium: `b1`, `r2`, `e4`
    spell_backward   kreng: `1k`, `2r`, `3e`, `4n`, `5g`; medium: the letters

What a step begins with says which part of the prompt it reads: a small model finds a place by what stands there, hardly
by counting. A running count stands behind each letter that is counted, where one comparison decides.
Left out: `slip`s of spelling, whose steps compute nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.base import Problem, Slip, Work, check_effort, no_slip
from puzzle_jax.tasks.gym import GymTask, dataset, problem_of


def _letters(entry: Mapping[str, Any], effort: str, slip: Slip) -> Work:
    letter, total, steps = entry["metadata"]["target_letter"], 0, []
    for word in entry["metadata"]["span"]:
        counted = ""
        for character in word:
            counted += character
            if character.lower() == letter:
                total = max(slip(f"{total}+1", total + 1), 0)
                counted += str(total)
        steps.append(f"{word[0]}{total}" if effort == "medium" else counted)
    return Work(tuple(steps), str(total))


def _spelling(entry: Mapping[str, Any], effort: str, slip: Slip) -> Work:
    word = entry["metadata"]["word"]
    steps = word if effort == "medium" else [f"{place}{letter}" for place, letter in enumerate(word, start=1)]
    return Work(tuple(steps), word[::-1])


@dataclass(frozen=True)
class _Steps:
    """How a family is solved.

    Attributes:
      level: name of its difficulty measure in the details of its problems.
      measure: that measure of an item's metadata.
      work: the steps of an item at medium or high effort.
    """

    level: str
    measure: Callable[[Mapping[str, Any]], int]
    work: Callable[[Mapping[str, Any], str, Slip], Work]


_FAMILIES: Mapping[str, _Steps] = MappingProxyType({
    "letter_counting": _Steps("words", lambda metadata: metadata["span_length"], _letters),
    "spell_backward": _Steps("letters", lambda metadata: metadata["word_len"], _spelling),
})  # fmt: skip

WORKED_GYM: tuple[str, ...] = tuple(_FAMILIES)
"""Families that have worked solutions."""


@dataclass(frozen=True)
class WorkedGymTask(GymTask):
    """One of `WORKED_GYM`.

    Raises `ConfigError` for any other family.
    """

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise ConfigError(f"{self.name} has no worked solutions; {', '.join(WORKED_GYM)} have")

    @property
    def identity(self) -> str:
        return f"{super().identity}, problems held out from pretraining"

    @property
    def bounded(self) -> bool:
        return True  # these scorers compare texts

    @property
    def level(self) -> str:
        return _FAMILIES[self.family].level

    def sample(self, seed: int) -> Problem:
        # Item i of a data set of seed s is drawn from s + i, so one data set has all seeds (and reads its words once).
        problem = problem_of(self.name, seed, dataset(self.family)[seed])
        steps = _FAMILIES[self.family]
        return replace(problem, details={steps.level: steps.measure(problem.entry["metadata"])})

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        if check_effort(effort) == "low":
            return Work((), problem.answer)
        return _FAMILIES[self.family].work(problem.entry, effort, slip)
