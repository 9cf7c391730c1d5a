"""Small files that runs keep: JSON objects, and writing so that there never is half a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError

PARTIAL = ".partial-"
"""In the name of a file or directory that is still being written."""


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it."""
    beside = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises PuzzleError when it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise PuzzleError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise PuzzleError(f"{path} holds {type(value).__name__}, but must hold an object")
    return value
