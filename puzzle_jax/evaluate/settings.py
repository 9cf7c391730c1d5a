"""What models are asked, and what an evaluation is; checked on construction, and nothing here opens a file.

`Asked` is what all verbs have that put problems to a model. `Settings` are an evaluation: what answers depend on is
`Settings.asked`, the rest is what tokens per second depend on. Left out: meshes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range, shown
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.tasks import EFFORTS, TASKS, check_effort
from puzzle_jax.temperature import check_temperature

_MOST = {"slots": 1 << 20, "max_batch": 1 << 20, "rounds": 10_000, "bootstrap": 1_000_000, "cache_memory": 1 << 50}
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
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


def every_effort(value: Any, where: str) -> Any:
    """Limits by effort where a single number is given for all; anything else as it is."""
    number = value if isinstance(value, int) else int(value) if str(value).strip().isdecimal() else None
    return value if number is None else dict.fromkeys(EFFORTS, number)


def byte_count(value: Any, where: str) -> Any:
    """A number of bytes that may be written with KiB, MiB or GiB; raises `ConfigError` for other texts."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+)\s*([KMG]iB|)", value)
    if not found:
        raise ConfigError(f"{where} is {shown(value)}, but must be bytes or a number with KiB, MiB or GiB")
    return int(found[1]) * _UNITS[found[2]]


BY_EFFORT: Mapping[str, Any] = {"read": every_effort}
"""Metadata of a field of limits by effort."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Problems that a model is asked, and how it answers.

    Attributes:
      tasks: embedded families, `reasoning-gym:FAMILY`, or .jsonl files of prompts and answers.
      efforts: reasoning efforts; every problem is asked at each.
      seed: draws other problems and other answers.
      temperature: of sampling; 0 is greedy.
      max_tokens: limit of an answer by effort, or one number for all; efforts that are not named keep the defaults,
        which suit the embedded parent.
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
      out: directory of everything that is written, and resumed from.
      problems: per effort and model, split evenly over the tasks.
      top_p: share of the probability that is sampled from.
      slots: answers generated together; rounding, and so an answer now and then, depends on it.
      cache_dtype: how keys and values are kept, one of compute, float32, bfloat16 and float8_e4m3fn, which uses the
        scales of the checkpoint, or none.
      bootstrap: draws behind every interval of a comparison.
      throughput: whether speed is measured and a frontier drawn.
      scenarios: lengths to measure, as NAME=INPUT:OUTPUT in tokens; one per effort, with every model's own lengths,
        comes on top.
      cache_memory: bytes (or KiB, MiB, GiB) for the caches of all requests that run together.
      max_batch: requests that run together at most, however small their caches.
      rounds: counted rounds of every measurement.
    """

    models: Mapping[str, Path]
    out: Path
    problems: int = 500
    top_p: float = 1.0
    slots: int = 64
    cache_dtype: str = "compute"
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
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        _ = self.lengths

    @property
    def reference(self) -> str:
        """The model that all others are compared with."""
        return next(iter(self.models))

    @property
    def lengths(self) -> tuple[Scenario, ...]:
        """The scenarios of fixed lengths."""
        return tuple(Scenario(name, *lengths) for name, lengths in self.scenarios.items())

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
