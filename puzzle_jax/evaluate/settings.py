"""What an evaluation is asked for, checked on construction; nothing here opens a file.

`Settings` are all of it. What answers depend on is `Settings.asked`, what only tokens per second depend on is
`SpeedSettings`. Left out: meshes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.tasks import EFFORTS, TASKS, check_effort
from puzzle_jax.temperature import check_temperature

_MOST = {"slots": 1 << 20, "max_batch": 1 << 20, "rounds": 10_000, "bootstrap": 1_000_000}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
MAX_TOKENS: Mapping[str, int] = {"low": 32, "medium": 64, "high": 128}
"""Limits that suit the embedded parent on the embedded tasks."""


@dataclass(frozen=True)
class Scenario:
    """Requests of one length: so many prompt tokens, so many generated ones."""

    name: str
    input_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name in EFFORTS:
            raise ConfigError(
                f"scenario name is {self.name!r}, but must be of letters, digits, '.', '-' and '_', and no effort"
            )
        if self.input_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(
                f"scenario {self.name!r} has {self.input_tokens} input and {self.output_tokens} output tokens, "
                "but needs at least 1 of each"
            )
        for name in ("input_tokens", "output_tokens"):
            check_range(f"{name} of scenario {self.name!r}", getattr(self, name), 1, MOST_TOKENS)

    @property
    def context(self) -> int:
        """Positions of a request at its end."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class SpeedSettings:
    """How tokens per second are measured.

    Attributes:
      scenarios: of fixed lengths; one per effort, with every model's own lengths, comes on top.
      cache_memory: bytes for the caches of all requests that run together.
      max_batch: so many requests run together at most.
      rounds: counted ones.
    """

    scenarios: tuple[Scenario, ...] = (Scenario("chat", 160, 128),)
    cache_memory: int = 16 << 20
    max_batch: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        names = [scenario.name for scenario in self.scenarios]
        if len(set(names)) < len(names):
            raise ConfigError(f"scenarios are named {', '.join(names)}, but every name may come once only")
        for name in ("cache_memory", "max_batch", "rounds"):
            _at_least_one(name, getattr(self, name))


@dataclass(frozen=True)
class Settings:
    """One evaluation.

    Attributes:
      models: directories by name; the first is the reference.
      out: directory of everything that is written.
      tasks: names.
      efforts: kept in rising order.
      problems: per effort and model, over all tasks together.
      seed: draws other problems and other answers.
      temperature, top_p: of sampling; temperature 0 is greedy.
      max_tokens: limit of an answer per effort.
      slots: answers generated together; rounding, and so an answer now and then, depends on it.
      cache_dtype: how keys and values are kept, one of `model.cache_format.CACHE_DTYPES`; float8 uses the scales of
        the checkpoint, or none.
      bootstrap: draws.
      speed: None measures no speed.
    """

    models: Mapping[str, Path]
    out: Path
    tasks: tuple[str, ...] = tuple(TASKS)
    efforts: tuple[str, ...] = EFFORTS
    problems: int = 500
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: Mapping[str, int] = field(default_factory=lambda: dict(MAX_TOKENS))
    slots: int = 64
    cache_dtype: str = "compute"
    bootstrap: int = 2000
    speed: SpeedSettings | None = field(default_factory=SpeedSettings)

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("models names no model, but needs at least one NAME=DIRECTORY")
        for name in self.models:
            if not NAME.fullmatch(name):
                raise ConfigError(f"model name is {name!r}, but must be of letters, digits, '.', '-' and '_'")
        for effort in (*self.efforts, *self.max_tokens):
            check_effort(effort)
        for name in ("tasks", "efforts"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name} is {','.join(values)!r}, but must name at least one, and each once")
        object.__setattr__(self, "efforts", tuple(effort for effort in EFFORTS if effort in self.efforts))
        for effort in self.efforts:
            if self.max_tokens.get(effort, 0) < 1:
                raise ConfigError(f"max_tokens has no limit of at least 1 for effort {effort!r}")
            check_range(f"max_tokens.{effort}", self.max_tokens[effort], 1, MOST_TOKENS)
        if self.problems < len(self.tasks):
            raise ConfigError(
                f"problems is {self.problems}, but must be at least 1 for each of the {len(self.tasks)} tasks"
            )
        for name in ("slots", "bootstrap"):
            _at_least_one(name, getattr(self, name))
        CacheFormat(self.cache_dtype)
        check_temperature("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but must be above 0 and at most 1")

    @property
    def reference(self) -> str:
        """The model that all others are compared with."""
        return next(iter(self.models))

    def asked(self) -> dict[str, Any]:
        """What answers depend on, models apart, as JSON values."""
        return {
            "tasks": list(self.tasks),
            "efforts": list(self.efforts),
            "problems": self.problems,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": {effort: self.max_tokens[effort] for effort in self.efforts},
            "slots": self.slots,
            "cache_dtype": self.cache_dtype,
        }


def limits_by_effort(text: str) -> dict[str, int]:
    """Limits of answers from a command line's `low=32,high=128`; raises ConfigError for another form."""
    limits = {}
    for part in [part.strip() for part in text.split(",") if part.strip()] or [text]:
        found = re.fullmatch(r"(\w+)=(\d{1,18})", part)
        if not found:
            raise ConfigError(f"--max-tokens has {part!r}, but must be of the form EFFORT=N")
        limits[check_effort(found[1])] = int(found[2])
    return limits


def _at_least_one(name: str, value: int) -> None:
    check_range(name, value, 1, _MOST.get(name, 1 << 50))
