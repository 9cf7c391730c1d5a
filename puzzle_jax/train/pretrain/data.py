"""Examples for pretraining the embedded parent, packed into rows with segment ids.

An example is a prompt at some effort with its worked completion. Whole examples are packed into rows; a segment
id per example keeps attention inside it, and only the completion is learned. Rows come in a few lengths
(`Bucket`): full attention costs length squared, so short examples must not pay for long ones, and a model learns
its first steps sooner on short examples, so that buckets may join late.

A batch is a pure function of (seed, step): training resumes exactly, and no state of the data is saved.
Problems of the held-out split never appear. Left out: splitting an example over rows, streaming from disk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from puzzle_jax.errors import MOST_TIMES, MOST_TOGETHER, MOST_TOKENS, ConfigError, check_range
from puzzle_jax.tasks import Chat, WorkedTask, is_held_out
from puzzle_jax.train.rows import Example, OpenRows
from puzzle_jax.train.rows import pack as pack_rows


@dataclass(frozen=True)
class Bucket:
    """One shape of batches.

    Attributes:
      length: tokens per row.
      rows: rows per batch.
      weight: how often its batches come, relative to the other buckets.
      shortest: examples of fewer tokens are left to other buckets.
      start: step at which it joins.
    """

    length: int
    rows: int
    weight: float
    shortest: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.length < 1 or self.rows < 1:
            raise ConfigError(f"bucket of {self.rows} rows of {self.length} tokens: both must be at least 1")
        check_range("bucket length", self.length, 1, MOST_TOKENS)
        check_range("bucket rows", self.rows, 1, MOST_TOGETHER)
        check_range(f"bucket of length {self.length}: start", self.start, 0, MOST_TIMES)
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"bucket of length {self.length}: weight is {self.weight}, but must be above 0")
        if not 1 <= self.shortest <= self.length:
            raise ConfigError(
                f"bucket of length {self.length}: shortest is {self.shortest}, but must be 1 to {self.length}"
            )
        if self.start < 0:
            raise ConfigError(f"bucket of length {self.length}: start is {self.start}, but must be at least 0")


@dataclass(frozen=True)
class Mixture:
    """What examples are drawn from: tasks and efforts with their relative weights."""

    tasks: tuple[tuple[WorkedTask, float], ...]
    efforts: tuple[tuple[str, float], ...]


class Batch(NamedTuple):
    """Packed rows. `targets[i]` is the token after `tokens[i]`, learned where `weights[i]` is 1.

    Segment ids count from 1 in each row; 0 marks padding.
    """

    tokens: Int[np.ndarray, "rows length"]
    targets: Int[np.ndarray, "rows length"]
    weights: Float[np.ndarray, "rows length"]
    segment_ids: Int[np.ndarray, "rows length"]


def make_example(chat: Chat, task: WorkedTask, seed: int, effort: str) -> Example | None:
    """The worked example of a seed, or None when the seed's problem is held out."""
    problem = task.sample(seed)
    if is_held_out(problem):
        return None
    prompt = chat.prompt_tokens(problem.prompt, effort)
    completion = chat.completion_tokens(task.trace(problem, effort), problem.answer)
    return Example((*prompt, *completion), len(prompt))


_OPEN_ROWS = 8
_MOST_REFUSALS = 10_000


@dataclass(frozen=True)
class BatchSource:
    """Every batch of a training run, by step."""

    chat: Chat
    mixture: Mixture
    buckets: tuple[Bucket, ...]
    seed: int
    steps: int

    def __post_init__(self) -> None:
        if not any(bucket.start == 0 for bucket in self.buckets):
            raise ConfigError("buckets: none has start 0, but the first batch needs one")

    def bucket(self, step: int) -> Bucket:
        """The shape of a step's batch."""
        joined = [bucket for bucket in self.buckets if bucket.start <= step]
        rng = random.Random(f"bucket:{self.seed}:{step}")
        return rng.choices(joined, [bucket.weight for bucket in joined])[0]

    def batch(self, step: int) -> Batch:
        """The batch of a step.

        Examples go first-fit into a few open rows; when one fits nowhere, the fullest row is closed, until the
        batch has its rows.

        Raises:
          ConfigError: when no task gives an example of a length that the bucket takes.
        """
        bucket = self.bucket(step)
        rng = random.Random(f"batch:{self.seed}:{step}")
        rows: list[list[Example]] = []
        opened = OpenRows[Example](bucket.length, _OPEN_ROWS, lambda example: len(example.tokens))
        while len(rows) + len(opened) < bucket.rows + _OPEN_ROWS:
            closed = opened.place(self._draw(rng, bucket))
            if closed is not None:
                rows.append(closed)
        rows += opened.fullest_first()
        return pack(rows[: bucket.rows], bucket.length, self.chat.pad_id)

    def _draw(self, rng: random.Random, bucket: Bucket) -> Example:
        tasks, task_weights = zip(*self.mixture.tasks, strict=True)
        efforts, effort_weights = zip(*self.mixture.efforts, strict=True)
        for _ in range(_MOST_REFUSALS):
            task = rng.choices(tasks, task_weights)[0]
            effort = rng.choices(efforts, effort_weights)[0]
            example = make_example(self.chat, task, rng.getrandbits(48), effort)
            if example is not None and bucket.shortest <= len(example.tokens) <= bucket.length:
                return example
        raise ConfigError(
            f"bucket of length {bucket.length}: no task gives examples of {bucket.shortest} to {bucket.length} tokens"
        )


def pack(rows: Sequence[Sequence[Example]], length: int, pad_id: int) -> Batch:
    """Lays each row's examples one after another; the rest is padding.

    Positions are left out: rotary embeddings tell distances, and segments keep attention inside an example.

    Raises:
      ValueError: when a row's examples are longer than `length`.
    """
    packed = pack_rows(rows, length, pad_id)
    return Batch(packed.tokens, packed.targets, packed.weights, packed.segment_ids)
