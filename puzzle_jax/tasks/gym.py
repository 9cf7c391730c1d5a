"""The families of reasoning-gym (extra `reasoning-gym`): procedurally generated problems with their own scorers.

`reasoning-gym:<family>` names one, at the library's default difficulty. The problem of a seed is the only item of the
family's data set of size 1 with that seed. Answers are scored by the family itself, often with partial credit; a few
families give 0.01 to 0.05 for any answer at all. Three of the library's scorers give full marks to wrong answers, so a
condition is checked here first: game_of_life_halting (which accepts every text), coin_flip (which accepts "0" where
0.3125 is correct) and puzzle24 (which accepts numbers that were not given, and 24.5).

Five families have no answer in `entry["answer"]`. For graph_color, propositional_logic and rubiks_cube a correct one is
in the item's metadata; for boxnet and rush_hour the library provides none, so that `Problem.answer` is "".
The family codeio runs code samples that ship with the package. Left out: `composite`, which is a mixture of the others;
curricula and other difficulties; a time limit for scorers, which `tasks.rewards.workers` provides.

Source: Stojanovski et al., Reasoning Gym (arXiv:2505.24760); behaviour as of release 0.1.25.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import io
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from fractions import Fraction
from importlib import metadata
from types import ModuleType
from typing import Any

import numpy as np

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.base import Problem
from puzzle_jax.tasks.safe_text import LONGEST, is_brief, is_expression, is_literal

PREFIX = "reasoning-gym:"

# Families whose items depend on the order of a set of strings, which differs from one Python process to the next.
_HASH_ORDERED = frozenset({
    "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder",
})  # fmt: skip
_BLOCK = 16

# Families whose scorers execute the answer, through eval or sympy's parser: text that is not plainly a value or a
# formula must not reach them. (A model's text is untrusted input.)
_LITERALS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
_EXPRESSIONS = frozenset({
    "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration",
})  # fmt: skip

# Families whose scorers take minutes over 1e99999999, U99999999 or A+99999999, or accept nan as correct.
_BRIEF = frozenset({"coin_flip", "complex_arithmetic", "rubiks_cube", "rush_hour"})

_ANSWERS_IN_METADATA = ("possible_answer", "example_answer", "example_correct_answer")


def gym_task(family: str) -> GymTask:
    """The family of this name.

    Raises:
      ConfigError: reasoning-gym is not installed, or has no such family.
    """
    known = _families()
    if family == "composite":
        raise ConfigError(f"{PREFIX}composite mixes other families, so ask for those by their own names")
    if family not in known:
        close = difflib.get_close_matches(family, known, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(close)}?" if close else f"it has {len(known)}, from {known[0]} to {known[-1]}"
        )
        raise ConfigError(f"reasoning-gym has no family {family!r}; {hint}")
    return GymTask(family)


def gym_families() -> tuple[str, ...]:
    """Every family that can be asked for, in alphabetical order; raises `ConfigError` as `gym_task` does."""
    return tuple(family for family in _families() if family != "composite")


@dataclass(frozen=True)
class GymTask:
    """One family. Make one with `gym_task(family)`."""

    family: str

    @property
    def name(self) -> str:
        return PREFIX + self.family

    @property
    def identity(self) -> str:
        return f"{self.name} of reasoning-gym {metadata.version('reasoning-gym')}"

    @property
    def bounded(self) -> bool:
        return False

    def sample(self, seed: int) -> Problem:
        """The problem of this seed, the same in every process.

        Families whose items depend on how Python orders sets are drawn in a child process that fixes the order, a block
        of seeds at a time (which takes a few seconds).
        """
        if self.family in _HASH_ORDERED:
            entry = pickle.loads(_drawn_block(self.family, seed // _BLOCK))[seed % _BLOCK]
        else:
            entry = draw(self.family, seed)
        return problem_of(self.name, seed, entry)

    def score(self, problem: Problem, final_text: str) -> float:
        """The family's own score of the text without surrounding white space, clipped to 0 to 1; 0 for an empty text.

        Text that the family's scorer would execute although it is no plain value or formula (`safe_text`) also scores
        0, and so does text on which the scorer raises. The text is to blame only if the same scorer handles the
        problem's own answer (or an empty one, where none is known); otherwise the exception is a bug, here or in the
        library, and propagates.
        """
        text = final_text.strip()
        if not text or not self._may_score(text, problem):
            return 0.0
        try:
            score = self._score(text, problem)
        except Exception:
            self._score(problem.answer, problem)
            return 0.0
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def _may_score(self, text: str, problem: Problem) -> bool:
        if text == problem.answer:
            return True
        if self.family in _LITERALS:
            return is_literal(text)
        if self.family in _EXPRESSIONS:
            return is_expression(text)
        return is_brief(text) if self.family in _BRIEF else len(text) <= LONGEST

    def _score(self, text: str, problem: Problem) -> float:
        with _alone(problem.seed):
            if self.family in _NEEDED and not _NEEDED[self.family](text, problem):
                return 0.0
            # Scorers read the entry and the configuration, never the seed: one data set scores every problem.
            return float(dataset(self.family).score_answer(text, problem.entry))


def problem_of(name: str, seed: int, entry: Mapping[str, Any]) -> Problem:
    """Returns the problem of a task that an item of the library states."""
    return Problem(name, seed, entry["question"], _answer(entry), entry=entry)


def _same_probability(text: str, problem: Problem) -> bool:
    given, right = (float(Fraction(number.replace(",", ""))) for number in (text, problem.answer))
    return abs(given - right) <= 1e-4 and math.isclose(given, right, rel_tol=0.01)


def _makes_24(text: str, problem: Problem) -> bool:
    import sympy  # a dependency of reasoning-gym

    numbers = sorted(map(int, re.findall(r"\d+", text)))
    return numbers == sorted(problem.entry["metadata"]["numbers"]) and sympy.parse_expr(text) == 24


_NEEDED: Mapping[str, Callable[[str, Problem], bool]] = {
    "coin_flip": _same_probability,
    "game_of_life_halting": lambda text, problem: text.lower() == problem.answer.lower(),
    "puzzle24": _makes_24,
}


def draw(family: str, seed: int) -> dict[str, Any]:
    """The family's item of a seed: question, answer and metadata, as the library returns it."""
    with _alone(seed):
        return _new_dataset(family, seed)[0]


@functools.cache
def dataset(family: str) -> Any:
    """Returns the library's data set of a family and seed 0, one object for all callers."""
    return _new_dataset(family, 0)


def _new_dataset(family: str, seed: int) -> Any:
    return _library().create_dataset(family, seed=seed, size=1)


def _answer(entry: Mapping[str, Any]) -> str:
    answers = [entry["answer"], *(entry["metadata"].get(name) for name in _ANSWERS_IN_METADATA)]
    answer = next((answer for answer in answers if answer is not None), "")
    return (answer if isinstance(answer, str) else json.dumps(answer)).strip()


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Seeds the global random generators, which some families draw from or seed, and restores their state at the end.
    What some families print is discarded."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@functools.lru_cache(maxsize=64)
def _drawn_block(family: str, block: int) -> bytes:
    """Pickled list of the family's items for the seeds from block * _BLOCK on, drawn under a fixed hash seed."""
    program = (
        "import pickle, sys; from puzzle_jax.tasks.gym import draw; "
        "family, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]); "
        "entries = [draw(family, first + i) for i in range(count)]; "
        "sys.stdout.buffer.write(pickle.dumps(entries))"
    )
    arguments = [sys.executable, "-c", program, family, str(block * _BLOCK), str(_BLOCK)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    return subprocess.run(arguments, env=environment, stdout=subprocess.PIPE, check=True).stdout


def _families() -> tuple[str, ...]:
    return tuple(sorted(_library().factory.DATASETS))


def _library() -> ModuleType:
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(
            f"tasks named {PREFIX}<family> need the package reasoning-gym, which is not installed; "
            "pip install reasoning-gym installs it"
        )
    import reasoning_gym

    return reasoning_gym
