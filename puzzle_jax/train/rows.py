"""Rows of a fixed length, filled with whole examples: the form in which every kind of training reads its data.

An example is a prompt and the assistant's answer. Examples lie in a row one after another, each a segment of its own:
segment ids keep attention within it and positions restart at 0, so that a packed example computes what it would alone.
Only the assistant's tokens are learnt: a position counts where its target, the next token, belongs to the completion.

Rows are filled first-fit (`OpenRows`): a few stay open, an example goes into the first with room for it, and when
there is none, the fullest is closed. With examples of at most a quarter of a row, at least 98% of all positions hold
a token.
Left out: splitting an example over rows, which would need attention across rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped

from puzzle_jax.errors import PuzzleError

Item = TypeVar("Item")
Extras = Callable[[int], Mapping[str, np.ndarray]]
"""Maps the index of an example to its further arrays [tokens, ...], which are read when it is packed."""


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation.

    Attributes:
      tokens: token ids; those from `prompt_length` on are the assistant's.
      prompt_length: number of tokens in the prompt, at least one.
      extras: further arrays [tokens, ...] by name, such as a teacher's most likely tokens at every position.

    Raises ValueError where their lengths are inconsistent.
    """

    tokens: tuple[int, ...] | Int[np.ndarray, " tokens"]
    prompt_length: int
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.prompt_length <= len(self.tokens):
            raise ValueError(f"prompt_length is {self.prompt_length}, but must be 1 to {len(self.tokens)}, the tokens")
        for name, values in self.extras.items():
            if values.ndim < 1 or len(values) != len(self.tokens):
                raise ValueError(f"extras {name!r} has shape {values.shape}, but must have {len(self.tokens)} rows")


class Packed(NamedTuple):
    """Packed rows, [rows, length]; training batches have an axis of micro-batches before these.

    Attributes:
      tokens: token ids.
      targets: `targets[i]` is the token after `tokens[i]` of the same example.
      weights: 1 where the target is a token that the assistant wrote, else 0.
      segment_ids: number of the example within its row, from 1; 0 marks padding.
      positions: position within the example, from 0; 0 in padding.
      extras: arrays [rows, length, ...] by name, 0 in padding.
    """

    tokens: Int[np.ndarray, "*micro rows length"]
    targets: Int[np.ndarray, "*micro rows length"]
    weights: Float[np.ndarray, "*micro rows length"]
    segment_ids: Int[np.ndarray, "*micro rows length"]
    positions: Int[np.ndarray, "*micro rows length"]
    extras: dict[str, Shaped[np.ndarray, "*micro rows length ..."]]


class OpenRows(Generic[Item]):
    """Rows that are being filled.

    Args:
      length: capacity of a row.
      most: largest number of rows open at a time.
      size: returns the size of an item.
      rows: rows that are already open.

    Attributes:
      rows: the open rows, oldest first.
    """

    def __init__(
        self, length: int, most: int, size: Callable[[Item], int], rows: Iterable[Sequence[Item]] = ()
    ) -> None:
        self.length, self.most, self.size = length, most, size
        self.rows: list[list[Item]] = [list(row) for row in rows]
        self._filled = [sum(map(size, row)) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, item: Item) -> list[Item] | None:
        """Puts an item into the first row with room for it; returns the row that had to be closed for it, if any.

        Raises ValueError for an item that no row can hold.
        """
        size = self.size(item)
        if size > self.length:
            raise ValueError(f"an example of {size} tokens fits no row of {self.length}")
        for index, filled in enumerate(self._filled):
            if filled + size <= self.length:
                self.rows[index].append(item)
                self._filled[index] += size
                return None
        closed = None
        if len(self.rows) == self.most:
            fullest = self._filled.index(max(self._filled))
            closed = self.rows.pop(fullest)
            del self._filled[fullest]
        self.rows.append([item])
        self._filled.append(size)
        return closed

    def fullest_first(self) -> list[list[Item]]:
        """The open rows, fullest first; of equally full ones, the oldest first."""
        order = sorted(range(len(self.rows)), key=lambda index: -self._filled[index])
        return [self.rows[index] for index in order]


def pack(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Packed:
    """Packs each row's examples one after another; the rest is padding.

    Args:
      rows: examples of each row, all with extras of the same names and trailing shapes.
      length: positions in a row.
      pad_id: token id of padding, and the target where there is no next token.

    Raises:
      ValueError: a row's examples are longer than `length`, or examples differ in their extras.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    targets = np.full(shape, pad_id, np.int32)
    weights = np.zeros(shape, np.float32)
    segment_ids = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    first = next((example for row in rows for example in row), None)
    extras = {
        name: np.zeros((*shape, *values.shape[1:]), values.dtype)
        for name, values in (first.extras if first else {}).items()
    }
    for row, members in enumerate(rows):
        start = 0
        for segment, example in enumerate(members, 1):
            end = start + len(example.tokens)
            if end > length:
                raise ValueError(f"row {row} holds at least {end} tokens, but has room for {length}")
            tokens[row, start:end] = example.tokens
            targets[row, start : end - 1] = example.tokens[1:]
            weights[row, start + example.prompt_length - 1 : end - 1] = 1.0
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            if example.extras.keys() != extras.keys():
                raise ValueError(f"an example has extras {sorted(example.extras)}, but others have {sorted(extras)}")
            for name, values in example.extras.items():
                if values.shape[1:] != extras[name].shape[2:]:
                    raise ValueError(
                        f"extras {name!r} has {values.shape[1:]} per token, but others have {extras[name].shape[2:]}"
                    )
                extras[name][row, start:end] = values
            start = end
    return Packed(tokens, targets, weights, segment_ids, positions, extras)


def packed(
    examples: Sequence[Example], *, rows: int, length: int, pad_id: int, extras: Extras | None = None
) -> Iterator[Packed]:
    """Packs every example once, first-fit, in batches [rows, length]; missing rows of the last one are padding.

    Raises `PuzzleError` where an example is longer than `length`.
    """
    filling = OpenRows[int](length, max(len(examples), 1), lambda index: len(examples[index].tokens))
    for index, example in enumerate(examples):
        if len(example.tokens) > length:
            raise PuzzleError(f"example {index} has {len(example.tokens)} tokens, but a row has {length}")
        filling.place(index)
    for start in range(0, len(filling), rows):
        members = filling.rows[start : start + rows]
        yield pack_indices(examples, members + [[]] * (rows - len(members)), length, pad_id, extras)


def pack_indices(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], length: int, pad_id: int, extras: Extras | None
) -> Packed:
    """`pack` for rows of indices into `examples`."""

    def example(index: int) -> Example:
        return examples[index] if extras is None else replace(examples[index], extras=extras(index))

    return pack([[example(index) for index in row] for row in rows], length, pad_id)
