"""A parent and finished searches of it, shared by tests of several files, which must not change them.

They are made once, by the first process of a test run that needs them; others wait until they are there.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle_jax.search.hours import left
from tests.search.toy_search import TIMELESS, save_parent, search


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A function of a name and of what makes that name's content, which returns the path where it was made once."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "of-all-search-tests"
    root.mkdir(exist_ok=True)

    def made(name: str, make: Callable[[Path], object]) -> Path:
        place, done = root / name, root / f"{name}-is-there"
        with (root / f"{name}-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(place)
                done.touch()
        return place

    return made


@pytest.fixture(scope="session")
def parent(once) -> Path:
    return once("parent", save_parent)


@pytest.fixture(scope="session")
def finished(once, parent) -> Path:
    """The run of a whole search."""

    def make(run: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(left, "_SHORT_SECONDS", 0.0)  # the time left is reported from the first stage on
            assert search(parent, run) == 0

    return once("finished", make)


@pytest.fixture(scope="session")
def timeless(once, finished, parent) -> Path:
    """The same search without measured speeds, so that running it again gives the same files."""

    def make(run: Path) -> None:
        shutil.copytree(finished, run)
        assert search(parent, run, *TIMELESS) == 0

    return once("timeless", make)
