"""The record that a stage leaves beside its outputs, read with suspicion: people copy, edit and cut run directories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.files import read_object

STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class StageRecord:
    """What stage.json says.

    Attributes:
      key: hash of inputs, settings and package version.
      seconds: that producing the outputs took.
      jax: version of JAX.
      outputs: digest of every file, by its path below the stage's directory.
      content: the whole object.
    """

    key: str
    seconds: float
    jax: str
    outputs: Mapping[str, str]
    content: Mapping[str, Any]


def read_stage_record(directory: Path) -> StageRecord | None:
    """The record in a stage's directory; None where there is none.

    Raises `PuzzleError`, naming file and field, for a record that no stage can have written.
    """
    path = directory / STAGE_FILE
    if not path.is_file():
        return None
    content = read_object(path)

    def refuse(field: str, rule: str) -> PuzzleError:
        return PuzzleError(
            f"{path}: {field} is {shown(content.get(field))}, but must be {rule}; "
            f"move {directory} away to run the stage again"
        )

    key, seconds, outputs = (content.get(field) for field in ("key", "seconds", "outputs"))
    if not isinstance(key, str):
        raise refuse("key", "a hash")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        raise refuse("seconds", "a number of at least 0")
    if not isinstance(outputs, dict) or not all(isinstance(d, str) and _inside(p) for p, d in outputs.items()):
        raise refuse("outputs", "digests by paths below the directory")
    return StageRecord(key, float(seconds), str(content.get("jax", "unknown")), outputs, content)


def _inside(path: str) -> bool:
    parts = PurePosixPath(path)
    return bool(path) and "\0" not in path and not parts.is_absolute() and ".." not in parts.parts
