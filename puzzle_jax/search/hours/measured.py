"""Measured seconds of a search's stages, and the seconds that another search will take on the same devices.

    seconds of a stage = compiling + (measured - compiling) x its roofline / roofline of the measured stage

A short search thus predicts a long one of the same model: it shows how far each stage falls short of the roofline, and
compiling, which does not grow with the work, is counted once. A stage that was killed and resumed is measured from
where it resumed.
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
      name: name of the stage.
      seconds: seconds that it took.
      compile_seconds: the part of these that went into tracing and compiling.
      roofline_seconds: the roofline's seconds for its work; 0 if the roofline has none.
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
      hardware: hardware that the roofline's seconds are for.
      prompt_tokens, answer_share: mean length of its prompts, and of its answers as a share of their limits.
      stages: its stages, in the order in which they ran.
    """

    hardware: Hardware
    prompt_tokens: int
    answer_share: Number
    stages: tuple[StageHours, ...]

    def seconds(self, roofline: Mapping[str, Number]) -> dict[str, Number]:
        """Predicts the seconds of another search's stages from its roofline seconds; a stage for which the roofline has
        none takes as long as it took here.
        """
        found = {}
        for stage in self.stages:
            growth = roofline.get(stage.name, 0.0) / stage.roofline_seconds if stage.roofline_seconds else 1.0
            found[stage.name] = stage.compile_seconds + growth * stage.working
        return found

    def write(self, run: Path) -> None:
        write_json(run / HOURS_FILE, to_plain(self))


def read_measured(run: Path) -> MeasuredSearch:
    """Reads the hours of a run. Raises PuzzleError if their file is missing or damaged."""
    path = run / HOURS_FILE
    if not path.is_file():
        raise PuzzleError(f"{path} is missing; a search writes it when all of its stages are done")
    return read(MeasuredSearch, path)
