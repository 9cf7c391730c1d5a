"""Batches made and placed ahead of the step, each with the state of the data after it.

A checkpoint needs the iterator's state after the batch that was trained on, not after the batches still waiting. So the
state is taken together with each batch and travels with it.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from puzzle_jax.runs import canonical

AHEAD = 2
"""Number of batches made ahead of the step."""

Positioned = tuple[object, object]
"""A batch, and the state of the data to save once it has been trained on; None where that is read after the step."""


@runtime_checkable
class Batches(Protocol):
    """A stream of batches that can resume from another stream's state; states are JSON values."""

    def __next__(self) -> object: ...
    def get_state(self) -> object: ...
    def set_state(self, state: Any, /) -> None: ...


def in_turn(batches: Batches, place: Callable[[Any], object]) -> Iterator[Positioned]:
    """Batches that are made only when they are asked for."""
    with contextlib.suppress(StopIteration):
        while True:
            yield place(next(batches)), None  # type: ignore[call-overload]


@contextlib.contextmanager
def prefetched(batches: Batches, place: Callable[[Any], object]) -> Iterator[Iterator[Positioned]]:
    """An iterator over batches that a thread makes ahead of time; leaving the context ends the thread.

    What `batches` or `place` raises for a batch is raised when that batch is asked for.
    """

    def make() -> Positioned:
        batch = next(batches)  # type: ignore[call-overload]
        state = json.loads(canonical(batches.get_state()))  # a copy, which later batches cannot change
        return place(batch), state

    def taken() -> Iterator[Positioned]:
        waiting = deque(pool.submit(make) for _ in range(AHEAD))
        with contextlib.suppress(StopIteration):
            while True:
                item = waiting.popleft().result()
                waiting.append(pool.submit(make))
                yield item

    with ThreadPoolExecutor(1, "batches") as pool:
        try:
            yield taken()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
