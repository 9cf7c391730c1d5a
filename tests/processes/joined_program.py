"""A multi-process program for tests: `python -m tests.processes.joined_program COUNT ACTIONS_OF_PROCESS_0 ...`."""

import os
import sys
import time

import numpy as np
from jax.experimental import multihost_utils

from puzzle_jax.commands import guarded
from puzzle_jax.errors import PuzzleError
from puzzle_jax.processes import distributed as processes
from puzzle_jax.processes import published as publishing
from puzzle_jax.processes.distributed import agree, from_primary, joined, kv_get, on_all, on_primary, process_index
from puzzle_jax.processes.published import decided, published, values_of

PROGRAM = "prog"


def main(count: int, *actions: str) -> int:
    """Runs the actions at the index of this process; returns its exit code."""

    processes.JOIN_SECONDS = int(os.environ.get("JOIN_SECONDS", processes.JOIN_SECONDS))

    def run() -> None:
        with joined(count, program=PROGRAM):
            for action in actions[process_index()].split("+"):
                ACTIONS[action]()

    return guarded(PROGRAM, run)


def ready() -> None:
    print("ready", flush=True)


def collect() -> None:
    """Waits in a collective operation, which Python's signal handlers cannot interrupt."""
    multihost_utils.process_allgather(np.ones(1))


def refuse() -> None:
    raise PuzzleError("scissors are not paper")


def crash() -> None:
    raise ValueError("a bug")


def open_missing() -> None:
    on_all("open", refuse)


def open_there() -> None:
    on_all("open", lambda: None)


def primary() -> None:
    on_primary("write", lambda: None)
    assert from_primary("where", lambda: f"in {process_index()}") == "in 0"


def publish() -> None:
    """Publishes bytes of several lengths (one in three parts), JSON and numbers; the other processes hold others."""
    here, publishing._PART_BYTES = process_index(), 5000
    for size in (0, 1, 1024, 1025, 10_003):
        content = np.random.default_rng(size).bytes(size)
        assert published(lambda content=content: content if here == 0 else b"") == content
    assert decided(lambda: {"next": [3, None, 0.1], "in": here}) == {"next": [3, None, 0.1], "in": 0}
    found = values_of(np.array([[np.pi + here, np.nan], [-0.0, here]]))
    assert found.shape == (2, 2) and found.tobytes() == np.array([[np.pi, np.nan], [-0.0, 0.0]]).tobytes()


def publish_late() -> None:
    """The primary process works while the others wait for what it decides."""
    assert decided(lambda: time.sleep(1) or "late") == "late"


ACTIONS = {
    "publish": publish,
    "publish-late": publish_late,
    "ready": ready,
    "collect": collect,
    "refuse": refuse,
    "crash": crash,
    "open-missing": open_missing,
    "open": open_there,
    "primary": primary,
    "sleep": lambda: time.sleep(600),
    "rest": lambda: time.sleep(1),
    "wait": lambda: kv_get("what nobody says"),
    "agree": lambda: agree("the recipe", {"steps": [1, 2], "parent": {"content": "ab", "size": 9}}),
    "agree-otherwise": lambda: agree("the recipe", {"steps": [1, 3], "parent": {"content": "cd", "size": 9}}),
    "nothing": lambda: None,
}

if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
