"""Settings of data made from traces: which files, what shape of batches, and how often each kind of trace comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from puzzle_jax.errors import MOST_SEED, MOST_TOGETHER, MOST_TOKENS, ConfigError, check_range
from puzzle_jax.tasks import check_effort

OVER_LONG = ("drop", "cut", "refuse")


@dataclass(frozen=True)
class TraceSettings:
    """What is trained on.

    Weights say how often an example of a kind comes relative to the others: 2 is twice as often as 1, and 0, the weight
    of whatever is not named where something is, is never. A task's weight and an effort's multiply.

    Attributes:
      paths: files of traces, .parquet or .jsonl, or directories whose files of these names are read in order of name.
      row_length: tokens of a row.
      rows: rows of a micro-batch, over all devices.
      micro_batches: micro-batches of a step.
      tasks: weights by task, as traces name them; empty: all equally.
      efforts: weights by effort; empty: all equally.
      seed: shuffles otherwise.
      over_long: what becomes of an example longer than a row: "drop", "cut" (its end), or "refuse" (an error).
      keep_truncated: whether answers count that a limit of tokens ended; a teacher can be followed at every token, but
        the student never sees such an answer end.
      min_completion: answers of fewer tokens are dropped.
      open_rows: rows that are being filled at a time; more fill them better, and hold examples back longer.
    """

    paths: tuple[Path, ...]
    row_length: int
    rows: int = 1
    micro_batches: int = 1
    tasks: Mapping[str, float] = field(default_factory=dict)
    efforts: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    over_long: str = "drop"
    keep_truncated: bool = True
    min_completion: int = 1
    open_rows: int = 16

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("paths names no file of traces, but must name at least one")
        check_range("row_length", self.row_length, 2, MOST_TOKENS)  # a prompt and an answer
        check_range("min_completion", self.min_completion, 1, MOST_TOKENS)
        for name in ("rows", "micro_batches", "open_rows"):
            check_range(name, getattr(self, name), 1, MOST_TOGETHER)
        check_range("seed", self.seed, 0, MOST_SEED)
        if self.over_long not in OVER_LONG:
            raise ConfigError(f"over_long is {self.over_long!r}, but must be one of {', '.join(OVER_LONG)}")
        for effort in self.efforts:
            check_effort(effort)
        for name in ("tasks", "efforts"):
            for kind, weight in getattr(self, name).items():
                if not (isfinite(weight) and weight >= 0):
                    raise ConfigError(f"{name} gives {kind!r} {weight}, but must give a finite number of at least 0")
