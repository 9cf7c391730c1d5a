"""Batches made and placed ahead of the step, without losing where the data stands at each of them.

What a checkpoint needs is the iterator's state after the batch that was trained on, not after those that wait. So the
state is taken together with each batch and travels with it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from puzzle_jax.runs import canonical

AHEAD = 2
"""Batches that wait for their step."""


@runtime_checkable
class Batches(Protocol):
    """A stream of batches that can go on from where another one was; states are JSON values."""

    def __next__(self) -> Any: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any, /) -> None: ...


class Positioned:
    """A batch and the state of the data to save with what was learnt from it."""

    def __init__(self, batch: Any, state: Callable[[], str]) -> None:
        self.batch, self._state = batch, state

    @property
    def state(self) -> Any:
        return json.loads(self._state())


@contextmanager
def in_turn(batches: Batches, place: Callable[[Any], Any] | None) -> Iterator[Iterator[Positioned]]:
    """An iterator over batches that are made when asked for; the data's state is that at the time when it is read."""

    def taken() -> Iterator[Positioned]:
        while True:
            try:
                batch = next(batches)  # type: ignore[call-overload]
            except StopIteration:
                return
            yield Positioned(batch if place is None else place(batch), lambda: canonical(batches.get_state()))

    yield taken()


@contextmanager
def prefetched(batches: Batches, place: Callable[[Any], Any] | None) -> Iterator[Iterator[Positioned]]:
    """An iterator over batches that a thread makes ahead of time; leaving the context ends the thread.

    What `batches` or `place` raises comes at the batch that it was raised for.
    """
    ready: queue.Queue[Positioned | BaseException] = queue.Queue(AHEAD)
    ended = threading.Event()

    def put(item: Positioned | BaseException) -> None:
        while not ended.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            while not ended.is_set():
                batch = next(batches)  # type: ignore[call-overload]
                state = canonical(batches.get_state())  # as text, so that later batches cannot change it
                put(Positioned(batch if place is None else place(batch), lambda state=state: state))
        except BaseException as error:
            put(error)

    def taken() -> Iterator[Positioned]:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        ended.set()
        thread.join()
