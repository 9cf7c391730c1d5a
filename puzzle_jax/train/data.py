"""Examples for pretraining the embedded parent, packed into rows with segment ids.

An example is a prompt at some effort with its worked completion. Whole examples are packed into rows; a segment id
per example keeps attention inside it, and only the completion is learned. Two row lengths: most examples are short
and fill short rows, the few long ones (far look-ups) fill long rows, since full attention costs length squared.
Problems of the held-out split never appear.
Left out: splitting an example over rows, streaming from disk.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from puzzle_jax.tasks import Chat, Task, is_held_out


@dataclass(frozen=True)
class Example:
    """Tokens of one conversation; those from `prompt_length` on are the assistant's."""

    task: str
    effort: str
    tokens: tuple[int, ...]
    prompt_length: int


class Batch(NamedTuple):
    """Packed rows. `targets[i]` is the token after `tokens[i]`, learned where `weights[i]` is 1.

    Segment ids count from 1 in each row; 0 marks padding.
    """

    tokens: Int[np.ndarray, "rows length"]
    targets: Int[np.ndarray, "rows length"]
    weights: Float[np.ndarray, "rows length"]
    segment_ids: Int[np.ndarray, "rows length"]


@dataclass(frozen=True)
class Mixture:
    """What examples are drawn from: tasks and efforts with their relative weights."""

    tasks: tuple[tuple[Task, float], ...]
    efforts: tuple[tuple[str, float], ...]


def make_example(chat: Chat, task: Task, seed: int, effort: str) -> Example | None:
    """The worked example of a seed, or None when the seed's problem is held out."""
    problem = task.sample(seed)
    if is_held_out(problem):
        return None
    prompt = chat.prompt_tokens(problem.prompt, effort)
    completion = chat.completion_tokens(task.trace(problem, effort), problem.answer)
    return Example(task.name, effort, (*prompt, *completion), len(prompt))


def examples(chat: Chat, mixture: Mixture, seed: int) -> Iterator[Example]:
    """Endless training examples; the order depends on `seed` alone."""
    rng = random.Random(f"examples:{seed}")
    tasks, task_weights = zip(*mixture.tasks, strict=True)
    efforts, effort_weights = zip(*mixture.efforts, strict=True)
    while True:
        task = rng.choices(tasks, task_weights)[0]
        effort = rng.choices(efforts, effort_weights)[0]
        example = make_example(chat, task, rng.getrandbits(48), effort)
        if example is not None:
            yield example


def pack(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """Lays each row's examples one after another; the rest is padding.

    Raises:
      ValueError: when a row's examples are longer than `length`.
    """
    shape = (len(rows), length)
    tokens = np.full(shape, pad_id, np.int32)
    targets = np.full(shape, pad_id, np.int32)
    weights = np.zeros(shape, np.float32)
    segment_ids = np.zeros(shape, np.int32)
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
            start = end
    return Batch(tokens, targets, weights, segment_ids)


def batches(
    source: Iterator[Example], shapes: Mapping[int, int], pad_id: int
) -> Iterator[Batch]:
    """Endless packed batches from endless examples.

    Every example goes into the shortest row length that holds it; a row is closed when the next example does not
    fit, and a batch of a length is given out when its rows are full. So each length comes up as often as its
    examples do. Examples that are longer than all rows are dropped.

    Args:
      source: examples.
      shapes: row length -> rows per batch.
      pad_id: token of padding.
    """
    lengths = sorted(shapes)
    closed: dict[int, list[list[Example]]] = {length: [] for length in lengths}
    opened: dict[int, list[list[Example]]] = {length: [] for length in lengths}
    for example in source:
        length = next((length for length in lengths if len(example.tokens) <= length), None)
        if length is None:
            continue
        _place(example, length, opened[length], closed[length])
        if len(closed[length]) == shapes[length]:
            yield pack(closed[length], length, pad_id)
            closed[length] = []


_MAX_OPEN_ROWS = 8


def _place(example: Example, length: int, opened: list[list[Example]], closed: list[list[Example]]) -> None:
    """First fit into one of a few open rows; the fullest is closed when none fits."""
    for row in opened:
        if sum(len(member.tokens) for member in row) + len(example.tokens) <= length:
            row.append(example)
            return
    if len(opened) == _MAX_OPEN_ROWS:
        fullest = max(range(len(opened)), key=lambda i: sum(len(member.tokens) for member in opened[i]))
        closed.append(opened.pop(fullest))
    opened.append([example])
