"""Settings of data made from traces: the shape of batches, and how often each kind of trace appears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from puzzle_jax.errors import MOST_SEED, MOST_TOGETHER, MOST_TOKENS, check_range
from puzzle_jax.tasks import check_effort

_RANGES = {
    "row_length": (2, MOST_TOKENS),  # a prompt and an answer
    "rows": (1, MOST_TOGETHER),
    "micro_batches": (1, MOST_TOGETHER),
    "seed": (0, MOST_SEED),
    "min_completion": (1, MOST_TOKENS),
    "heldout": (1, MOST_TOGETHER),
}


@dataclass(frozen=True)
class DataSettings:
    """Settings of the data to train on.

    Weights say how often an example of a kind appears relative to the others: 2 is twice as often as 1, and 0 is never.
    Where some kinds are named, the others have weight 0. A task's weight and an effort's multiply.

    Attributes:
      row_length: number of tokens in a row.
      rows: rows of a micro-batch, over all devices.
      micro_batches: micro-batches of a step.
      tasks: weight of each task that is used, or a list of tasks; empty means all, equally.
      efforts: weight of each effort that is used, likewise.
      seed: random seed of the shuffle.
      over_long: what happens to an example longer than a row: it is dropped, its end is cut off, or it is an error.
      keep_truncated: whether answers that a token limit ended are kept; a teacher can be followed at every token, but
        the student never sees such an answer end.
      min_completion: least number of tokens in an answer; shorter ones are dropped.
      heldout: approximate number of answers held out for evaluation; all answers to one prompt are on one side.
    """

    row_length: int = 512
    rows: int = 4
    micro_batches: int = 1
    tasks: Mapping[str, float] = field(default_factory=dict)
    efforts: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    over_long: Literal["drop", "cut", "refuse"] = "drop"
    keep_truncated: bool = True
    min_completion: int = 1
    heldout: int = 64

    def __post_init__(self) -> None:
        for name, bounds in _RANGES.items():
            check_range(f"data.{name}", getattr(self, name), *bounds)
        for effort in self.efforts:
            check_effort(effort)
        for name in ("tasks", "efforts"):
            for kind, weight in getattr(self, name).items():
                check_range(f"data.{name}.{kind}", weight, 0)

    @property
    def tokens_per_step(self) -> int:
        return self.row_length * self.rows * self.micro_batches
