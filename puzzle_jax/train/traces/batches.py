"""An endless stream of batches of packed traces, in an order that a few numbers describe.

Grain gives the order: the examples of every (task, effort) are shuffled, anew in every epoch, and mixed by weight, so
that example number n is known without those before it. Rows are filled first-fit from that stream. The state is then
the position in the stream and the examples in the open rows, so that a run resumes bit-identically after any step,
whatever the size of the data.

Every process makes the same batch of all rows, since packing costs little compared with a step, and takes its own rows
later: batches do not depend on the number of processes or devices. Left out: streaming data larger than memory, and
making batches ahead of time, which the training loop does.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeGuard

import jax
import numpy as np

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.train.rows import Extras, OpenRows, Packed, pack_indices
from puzzle_jax.train.traces.examples import TraceExample
from puzzle_jax.train.traces.settings import DataSettings

OPEN_ROWS = 16
"""Number of rows being filled at a time; more would leave less padding, but hold examples back longer."""


class TraceBatches:
    """The batches of a run: `Packed` with arrays [micro_batches, rows, length].

    Args:
      examples: examples to train on, none longer than `settings.row_length`.
      extras: gives further arrays to pack, with the same names for every example.

    Attributes:
      order: index of the example at every position of the endless stream.

    Raises:
      PuzzleError: grain is not installed, there is no example, weights name a task or effort that no example has, or
        weights leave no example.
    """

    def __init__(
        self, examples: Sequence[TraceExample], settings: DataSettings, pad_id: int, extras: Extras | None = None
    ) -> None:
        self.examples, self.settings, self.pad_id, self._extras = examples, settings, pad_id, extras
        self.order = _order(examples, settings)
        self._position = 0
        self._open = self._open_rows([])

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        settings = self.settings
        rows: list[list[int]] = []
        while len(rows) < settings.micro_batches * settings.rows:
            closed = self._open.place(int(self.order[self._position]))
            self._position += 1
            if closed is not None:
                rows.append(closed)
        packed = pack_indices(self.examples, rows, settings.row_length, self.pad_id, self._extras)

        def split(values: np.ndarray) -> np.ndarray:
            return values.reshape(settings.micro_batches, settings.rows, *values.shape[1:])

        return jax.tree.map(split, packed)

    def get_state(self) -> dict[str, object]:
        """State of the stream after the last batch, as JSON: at most `OPEN_ROWS` rows of indices and two values."""
        rows = [list(row) for row in self._open.rows]
        return {"fingerprint": self.fingerprint, "position": self._position, "open": rows}

    def set_state(self, state: Mapping[str, object]) -> None:
        """Resumes after the batch at which `get_state` returned this.

        Raises PuzzleError for the state of other data or settings, or a value that is not a state.
        """
        if state.get("fingerprint") != self.fingerprint:
            raise PuzzleError(
                "the state of the data belongs to other traces or settings "
                f"(fingerprint {state.get('fingerprint')}, but here it is {self.fingerprint}); "
                "give those that the run began with, or begin a new run"
            )
        position, rows = state.get("position"), state.get("open")
        if not isinstance(position, int) or position < 0 or not self._are_rows(rows):
            raise PuzzleError(f"the state of the data is damaged: position is {shown(position)}, open is {shown(rows)}")
        self._position, self._open = position, self._open_rows(rows)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what determines the batches: all examples, settings, and the first indices of the order, in which a
        change of grain's shuffling would show. File names and extras do not count."""
        own = self.settings  # only these count; others choose examples, which are hashed themselves
        shape = [own.row_length, own.rows, own.micro_batches, own.seed, OPEN_ROWS]
        weights = [sorted((kind, float(weight)) for kind, weight in by.items()) for by in (own.tasks, own.efforts)]
        first = [int(self.order[position]) for position in range(256)]
        digest = hashlib.sha256(json.dumps([shape, weights, self.pad_id, first]).encode())
        for example in self.examples:
            digest.update(f"{example.task} {example.effort} {example.prompt_length} {len(example.tokens)}\n".encode())
            digest.update(np.asarray(example.tokens, "<i4").tobytes())
        return digest.hexdigest()[:16]

    def _open_rows(self, rows: Sequence[Sequence[int]]) -> OpenRows[int]:
        return OpenRows(self.settings.row_length, OPEN_ROWS, self._size, rows)

    def _size(self, index: int) -> int:
        return len(self.examples[index].tokens)

    def _are_rows(self, rows: object) -> TypeGuard[list[list[int]]]:
        if not isinstance(rows, list) or len(rows) > OPEN_ROWS:
            return False
        known = range(len(self.examples))
        indices = all(isinstance(row, list) and all(type(i) is int and i in known for i in row) for row in rows)
        return indices and all(sum(map(self._size, row)) <= self.settings.row_length for row in rows)


def _order(examples: Sequence[TraceExample], settings: DataSettings) -> Any:
    """An endless grain MapDataset of indices of examples.

    Grain rounds shares to whole multiples of a hundredth of the smallest, so that a group may come up to 1% less often
    than its weight says; within a group every example comes once before any comes again.
    """
    try:
        import grain
    except ImportError:
        raise PuzzleError("training on traces needs grain: pip install grain") from None

    groups: dict[tuple[str, str], list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault((example.task, example.effort), []).append(index)
    if not groups:
        raise PuzzleError("there is no trace to train on")
    _check_known("tasks", settings.tasks, sorted({task for task, _ in groups}))
    _check_known("efforts", settings.efforts, sorted({effort for _, effort in groups}))
    members, shares = [], []
    for (task, effort), indices in sorted(groups.items()):
        weight = _weight(settings.tasks, task) * _weight(settings.efforts, effort)
        if weight > 0:
            # Hashed, so that groups and consecutive seeds share no orders, though grain adds the epoch to it.
            seed = zlib.crc32(json.dumps([settings.seed, task, effort]).encode())
            members.append(grain.MapDataset.source(indices).shuffle(seed=seed).repeat())
            shares.append(weight * len(indices))
    if not members:
        raise PuzzleError("the weights of tasks and efforts leave no trace: every product of two of them is 0")
    return grain.MapDataset.mix(members, shares)


def _weight(weights: Mapping[str, float], kind: str) -> float:
    """The weight of a task or an effort; where some are named, the others have weight 0."""
    return weights.get(kind, 0.0) if weights else 1.0


def _check_known(name: str, weights: Mapping[str, float], known: Sequence[str]) -> None:
    for kind in weights:
        if kind not in known:
            raise PuzzleError(f"{name} names {kind!r}, but the traces have only {', '.join(known)}")
