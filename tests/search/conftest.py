"""A parent and finished searches of it, shared by tests of several files, which must not change them.

They are made once, by the first process of a test run that needs them; others wait until they are there.
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.hours import left
from tests.search.toy_search import TIMELESS, save_parent, search
from tests.support import random_params, small_config


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


@pytest.fixture(scope="session")
def small_parent():
    """A configuration, its parameters and four traces; no token is routed to expert 6 of layer 1."""
    config = small_config()
    params = random_params(config)
    moe = params["layers"][1]["moe"]
    moe["router_bias"] = moe["router_bias"].at[6].set(-1e4)
    rng = np.random.default_rng(0)
    sizes = [(9, 7), (14, 3), (40, 12), (25, 30)]
    traces = [
        Trace(
            "t",
            "low",
            i,
            {},
            tuple(rng.integers(0, 97, p).tolist()),
            tuple(rng.integers(0, 97, c).tolist()),
            1.0,
            False,
        )
        for i, (p, c) in enumerate(sizes)
    ]
    return config, params, traces
