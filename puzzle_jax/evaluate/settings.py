"""Settings of evaluations, and of all verbs that ask a model problems; checked on construction without opening a file.

Every verb that asks a model problems has the settings of `Asked`. `Settings` adds those of an evaluation: answers
depend on `Settings.asked`, tokens per second on the rest as well. Left out: meshes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from puzzle_jax.codec import to_plain
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_choice, check_range, shown
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.weights import check_weights
from puzzle_jax.tasks import EFFORTS, TASKS, check_effort
from puzzle_jax.temperature import check_temperature

_MOST = {"slots": 1 << 20, "max_batch": 1 << 20, "rounds": 10_000, "bootstrap": 1_000_000, "cache_memory": 1 << 50}
_ASKED = ("tasks", "efforts", "problems", "seed", "temperature", "top_p", "max_tokens", "slots", "cache_dtype")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAX_TOKENS: Mapping[str, int] = {"low": 32, "medium": 64, "high": 128}
"""Token limits that suit the embedded parent on the embedded tasks."""


def every_effort(value: object, where: str) -> object:
    """Expands a single number to a limit for every effort; returns anything else unchanged."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return dict.fromkeys(EFFORTS, value) if isinstance(value, int) else value


def byte_count(value: object, where: str) -> object:
    """Converts a string that may end in KiB, MiB or GiB to bytes; returns values of other types unchanged.

    Raises `ConfigError` for other strings.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+)\s*([KMG]iB|)", value)
    if not found:
        raise ConfigError(f"{where} is {shown(value)}, but must be bytes or a number with KiB, MiB or GiB")
    return int(found[1]) * _UNITS[found[2]]


BY_EFFORT: Mapping[str, object] = {"read": every_effort}
"""Metadata of a field that holds limits by effort."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Problems that a model is asked, and how it answers.

    Attributes:
      tasks: embedded families, `reasoning-gym:FAMILY`, or .jsonl files of prompts and answers.
      efforts: reasoning efforts; every problem is asked at each. For a model that can only switch its thinking on and
        off, low is off; beyond that, efforts differ by `max_tokens` alone.
      seed: seed of the problems that are drawn and of the answers.
      temperature: sampling temperature; 0 means greedy.
      max_tokens: token limit of an answer by effort, or one number for all; efforts that are not named keep the
        defaults, which suit the embedded parent.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    efforts: tuple[str, ...] = EFFORTS
    seed: int = 0
    temperature: float = 1.0
    max_tokens: Mapping[str, int] = field(default_factory=lambda: dict(MAX_TOKENS), metadata=BY_EFFORT)

    def __post_init__(self) -> None:
        for effort in (*self.efforts, *self.max_tokens):
            check_effort(effort)
        for name in ("tasks", "efforts"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} is {','.join(values)!r}, but must name at least one, and each once")
        object.__setattr__(self, "efforts", tuple(effort for effort in EFFORTS if effort in self.efforts))
        object.__setattr__(self, "max_tokens", {**MAX_TOKENS, **self.max_tokens})
        for effort, limit in self.max_tokens.items():
            check_range(f"max_tokens.{effort}", limit, 1, MOST_TOKENS)
        check_temperature("temperature", self.temperature)


@dataclass(frozen=True)
class Settings(Asked):
    """One evaluation.

    Attributes:
      models: checkpoint directories by name (parent=DIR,child=DIR); the first is the reference.
      out: directory of everything that is written; an interrupted evaluation resumes from it.
      problems: number of problems per effort and model, split evenly over the tasks.
      top_p: share of the probability mass that is sampled from.
      slots: answers generated together; rounding, and so an occasional answer, depends on it.
      weights: how weights are held: packed, dense, or auto (see `model.weights`).
      cache_dtype: dtype of the KV cache: compute, float32, bfloat16, or float8_e4m3fn, which uses the checkpoint's
        scales where it has any.
      cache_dtypes: the same by model, for models that differ from `cache_dtype`.
      rows: which rows of a file of prompts are asked: "all", or "unseen", the sixth that is used neither for selection
        nor for training where a search and training are given the same file.
      bootstrap: number of bootstrap draws behind every interval of a comparison.
      throughput: whether to measure speed and draw the frontier.
      scenarios: lengths to measure, as NAME=INPUT:OUTPUT in tokens; every effort is measured as well, at each model's
        own lengths.
      cache_memory: bytes (or KiB, MiB, GiB) for the caches of all requests that run together.
      max_batch: most requests that run together, however small their caches.
      rounds: timed rounds of every measurement, after a first run that compiles.
    """

    models: Mapping[str, Path]
    out: Path
    problems: int = 500
    top_p: float = 1.0
    slots: int = 64
    weights: str = "auto"
    cache_dtype: str = "compute"
    cache_dtypes: Mapping[str, str] = field(default_factory=dict)
    rows: Literal["all", "unseen"] = "all"
    bootstrap: int = 2000
    throughput: bool = True
    scenarios: Mapping[str, tuple[int, int]] = field(default_factory=lambda: {"chat": (160, 128)})
    cache_memory: int = field(default=16 << 20, metadata={"read": byte_count})
    max_batch: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise ConfigError("models names no model, but needs at least one NAME=DIRECTORY")
        for name in self.models:
            if not NAME.fullmatch(name):
                raise ConfigError(f"model name is {name!r}, but must be of letters, digits, '.', '-' and '_'")
        if self.problems < len(self.tasks):
            raise ConfigError(
                f"problems is {self.problems}, but must be at least 1 for each of the {len(self.tasks)} tasks"
            )
        for name, most in _MOST.items():
            check_range(name, getattr(self, name), 1, most)
        CacheFormat(self.cache_dtype)
        for name, dtype in self.cache_dtypes.items():
            check_choice("cache_dtypes", name, self.models)
            CacheFormat(dtype)
        check_weights(self.weights)
        check_range("top_p", self.top_p, 0, 1, above=True)
        for scenario in self.lengths:
            if scenario.name in EFFORTS:
                raise ConfigError(f"scenario name is {scenario.name!r}, but must not be that of an effort")

    @property
    def reference(self) -> str:
        """The model that all others are compared with."""
        return next(iter(self.models))

    def cache_of(self, model: str) -> str:
        """The dtype of a model's KV cache."""
        return self.cache_dtypes.get(model, self.cache_dtype)

    @property
    def split(self) -> str:
        """The split of `evaluate.accuracy.QuestionSet` that problems come from."""
        return "unseen" if self.rows == "unseen" else "evaluation"

    @property
    def lengths(self) -> tuple[Scenario, ...]:
        """The scenarios of fixed lengths."""
        return tuple(Scenario(name, *lengths) for name, lengths in self.scenarios.items())

    def asked(self) -> dict[str, object]:
        """Everything that answers depend on except the models, as JSON values."""
        values: dict[str, object] = {name: to_plain(getattr(self, name)) for name in _ASKED}
        values["max_tokens"] = {effort: self.max_tokens[effort] for effort in self.efforts}
        return values | ({"cache_dtypes": dict(self.cache_dtypes)} if self.cache_dtypes else {})
