"""Examples for pretraining the embedded parent, packed into rows with segment ids.

An example is a prompt at some effort with its worked completion. Whole examples are packed into rows; a segment
id per example keeps attention inside it, and only the completion is learned. Rows come in a few lengths
(`Bucket`): full attention costs length squared, so short examples should not pay for long ones; and a model takes
its first steps faster on short examples, so a bucket may start late.

A batch is a pure function of (seed, step), so the state of the data is one number.
Problems of the held-out split never appear. Left out: splitting an example over rows, streaming from disk.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from puzzle_jax.errors import MOST_TIMES, MOST_TOGETHER, MOST_TOKENS, ConfigError, check_range
from puzzle_jax.tasks import Chat, WorkedTask, is_held_out
from puzzle_jax.train.pretrain.habits import Habits, written
from puzzle_jax.train.rows import Example, OpenRows, Packed, pack


@dataclass(frozen=True)
class Bucket:
    """One shape of batch.

    Attributes:
      length: tokens per row.
      rows: rows per batch.
      weight: how often its batches come, relative to the other buckets.
      shortest: examples of fewer tokens are left to other buckets.
      start: first step at which it is drawn.
    """

    length: int
    rows: int
    weight: float
    shortest: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        check_range("bucket length", self.length, 1, MOST_TOKENS)
        check_range("bucket rows", self.rows, 1, MOST_TOGETHER)
        where = f"bucket of length {self.length}:"
        check_range(f"{where} start", self.start, 0, MOST_TIMES)
        check_range(f"{where} weight", self.weight, 0, above=True)
        check_range(f"{where} shortest", self.shortest, 1, self.length)


def make_example(chat: Chat, task: WorkedTask, seed: int, effort: str, habits: Habits, length: int) -> Example | None:
    """The worked example of a seed, or None when the seed's problem is held out.

    An example whose analysis does not end is cut after `length` tokens.
    """
    problem = task.sample(seed)
    if is_held_out(problem):
        return None
    prompt = chat.prompt_tokens(problem.prompt, effort)
    analysis, answer = written(task, problem, effort, habits, length)
    completion = chat.completion_tokens(analysis, answer or "", prompt, cut=answer is None)
    if answer is None:
        completion = completion[: max(length - len(prompt), 1)]
    return Example((*prompt, *completion), len(prompt))


_OPEN_ROWS = 8
_MOST_REFUSALS = 10_000


@dataclass
class BatchSource:
    """The batches of a training run, by step and as a stream.

    A batch is `Packed` with `extras["rounded"]`, true if the experts are rounded to MXFP4 in its step.

    Attributes:
      tasks, efforts: what examples are drawn from, with relative weights.
      steps: number of steps in the run.
      habits: how the examples are written.
      rounded_steps: number of last steps, in which the experts are rounded to MXFP4.
      next_step: the step whose batch comes next, from 0.
    """

    chat: Chat
    tasks: Sequence[tuple[WorkedTask, float]]
    efforts: Sequence[tuple[str, float]]
    buckets: tuple[Bucket, ...]
    seed: int
    steps: int
    habits: Habits = field(default_factory=Habits)
    rounded_steps: int = 0
    next_step: int = 0

    def __post_init__(self) -> None:
        if not any(bucket.start == 0 for bucket in self.buckets):
            raise ConfigError("buckets: none has start 0, but the first batch needs one")

    def __next__(self) -> Packed:
        if self.next_step >= self.steps:
            raise StopIteration
        self.next_step += 1
        return jax.tree.map(lambda part: part[None], self.batch(self.next_step - 1))  # one micro-batch

    def get_state(self) -> int:
        return self.next_step

    def set_state(self, state: int, /) -> None:
        self.next_step = state

    def bucket(self, step: int) -> Bucket:
        """The shape of a step's batch."""
        joined = [bucket for bucket in self.buckets if bucket.start <= step]
        rng = random.Random(f"bucket:{self.seed}:{step}")
        return rng.choices(joined, [bucket.weight for bucket in joined])[0]

    def batch(self, step: int) -> Packed:
        """The batch of a step.

        Examples go first-fit into a few open rows; when one fits nowhere, the fullest row is closed. This repeats
        until the batch has its rows.

        Raises:
          ConfigError: no task gives an example of a length that the bucket takes.
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
        rounded = np.asarray(step >= self.steps - self.rounded_steps)
        return pack(rows[: bucket.rows], bucket.length, self.chat.pad_id)._replace(extras={"rounded": rounded})

    def _draw(self, rng: random.Random, bucket: Bucket) -> Example:
        tasks, task_weights = zip(*self.tasks, strict=True)
        efforts, effort_weights = zip(*self.efforts, strict=True)
        for _ in range(_MOST_REFUSALS):
            task = rng.choices(tasks, task_weights)[0]
            effort = rng.choices(efforts, effort_weights)[0]
            example = make_example(self.chat, task, rng.getrandbits(48), effort, self.habits, bucket.length)
            if example is not None and bucket.shortest <= len(example.tokens) <= bucket.length:
                return example
        raise ConfigError(
            f"bucket of length {bucket.length}: no task gives examples of {bucket.shortest} to {bucket.length} tokens"
        )
