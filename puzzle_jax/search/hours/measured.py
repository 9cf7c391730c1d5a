"""Measured seconds of a search's stages, and the seconds that another search will take on the same devices.

    seconds of a stage = compiling + (measured - compiling) x its roofline / that of what was measured

A short search of the same model so tells how long a long one will be: how far each stage stays behind the roofline is
learnt from it, and compiling, which does not grow with the work, is counted once. A stage that was killed and went on
is measured from where it went on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.codec import read, to_plain
from puzzle_jax.costs.hardware import Hardware
from puzzle_jax.errors import PuzzleError, check_range
from puzzle_jax.numeric import Number
from puzzle_jax.runs import write_json

HOURS_FILE = "hours.json"


@dataclass(frozen=True)
class StageHours:
    """One stage.

    Attributes:
      name: the stage's.
      seconds: that it took.
      compile_seconds: those of them that went into tracing and compiling.
      roofline_seconds: what the roofline says of its work; 0 where it says nothing.
    """

    name: str
    seconds: Number
    compile_seconds: Number
    roofline_seconds: Number

    def __post_init__(self) -> None:
        for name in ("seconds", "compile_seconds", "roofline_seconds"):
            check_range(name, getattr(self, name), 0, 1e12)

    @property
    def working(self) -> Number:
        return max(0.0, self.seconds - self.compile_seconds)


@dataclass(frozen=True)
class MeasuredSearch:
    """A search that has run.

    Attributes:
      hardware: that the roofline's seconds are of.
      prompt_tokens, answer_share: mean lengths of its prompts, and of its answers as a share of their limits.
      stages: in the order in which they ran.
    """

    hardware: Hardware
    prompt_tokens: int
    answer_share: Number
    stages: tuple[StageHours, ...]

    def seconds(self, roofline: Mapping[str, Number]) -> dict[str, Number]:
        """Seconds of the stages of another search, from those by roofline; a stage of which that says nothing takes as
        long as it took.
        """
        found = {}
        for stage in self.stages:
            growth = roofline.get(stage.name, 0.0) / stage.roofline_seconds if stage.roofline_seconds else 1.0
            found[stage.name] = stage.compile_seconds + growth * stage.working
        return found

    def write(self, run: Path) -> None:
        write_json(run / HOURS_FILE, to_plain(self))


def read_measured(run: Path) -> MeasuredSearch:
    """The hours of a run. Raises PuzzleError where the run has none, or a damaged file."""
    path = run / HOURS_FILE
    if not path.is_file():
        raise PuzzleError(f"{path} is missing; a search writes it when all of its stages are done")
    return read(MeasuredSearch, path)
