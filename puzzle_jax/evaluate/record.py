"""The directory of an evaluation: what it is of, and that nobody else works in it.

    OUT/settings.json          what answers depend on: settings, models' fingerprints, the date that templates see
    OUT/answers/<model>.jsonl  one answer per line, as they come
    OUT/throughput.jsonl       one round of one workload per line
    OUT/evaluation.json, report.md, frontier.png

A directory belongs to one set of settings and models: with others it is refused, since old and new answers would mix.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import read_object, write_beside

SETTINGS_FILE = "settings.json"
_LONGEST_SHOWN = 120


def recorded_date(out: Path) -> datetime.datetime | None:
    """The date of an evaluation that was begun in `out`; None where there is none.

    Raises PuzzleError when `out` is a file, or holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise PuzzleError(f"{out} is a file, but must be a directory for the evaluation")
    path = out / SETTINGS_FILE
    if not path.exists():
        names = sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(f".{SETTINGS_FILE}"))
        if names:
            raise PuzzleError(
                f"{out} holds files that are no evaluation's ({names[0]}); name an empty or new directory"
            )
        return None
    try:
        return datetime.datetime.fromisoformat(read_object(path)["date"])
    except (KeyError, TypeError, ValueError):
        raise PuzzleError(f"{path} is damaged: it holds no date") from None


@contextlib.contextmanager
def opened(out: Path, identity: Mapping[str, Any], date: datetime.datetime) -> Iterator[None]:
    """Makes or enters the directory, and holds it until the block ends, however it ends.

    Args:
      out: directory.
      identity: JSON values that answers depend on.
      date: that templates see.

    Raises PuzzleError when it is of another identity, cannot be written, or another process works in it; also for
    whatever the system refuses inside the block.
    """
    path = out / SETTINGS_FILE
    if path.exists() and not path.is_file():
        raise PuzzleError(f"{path} is no file, but must be the record of an evaluation")
    wanted = json.loads(json.dumps(identity))
    if path.exists():
        held = read_object(path).get("identity")
        if held != wanted:
            raise PuzzleError(
                f"{out} holds an evaluation of another kind ({_difference(held, wanted)}); "
                "name another directory, or remove this one if it is no longer needed"
            )
    else:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_beside(path, json.dumps({"identity": wanted, "date": date.isoformat()}, indent=2).encode())
        except OSError as error:
            raise PuzzleError(f"{out} cannot be written: {error.strerror}") from error
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
            except BlockingIOError as error:
                raise PuzzleError(f"another process works in {out}; wait for it or stop it") from error
            yield
    except OSError as error:  # a full disk, a directory without permission, something else in a file's place
        raise PuzzleError(f"{error.filename or out} cannot be used: {error.strerror or error}") from error


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first place in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
        return _difference(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    return f"{path or 'the record'} was {_brief(old)}, now {_brief(new)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."
