"""A directory of one process for files that nobody else reads, which is removed when the process ends.

It is created among the temporary files (TMPDIR). A process that is killed cannot remove its own; the next one that asks
for a directory does, since the system has released the lock that every owner holds.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import locked

_PREFIX, _LOCK = "puzzle_jax-run-", "owner.lock"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new directory, which exists as long as the context."""
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, PuzzleError), locked(left, _LOCK):
            shutil.rmtree(left)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with open(directory / f"{_LOCK}.new", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / f"{_LOCK}.new").rename(directory / _LOCK)  # held before anybody can see it
            yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
