"""Batches of traces, which ranking and scoring read.

Both look at what the parent writes, its reasoning included; calibrating on prompts alone is known to destroy a
child's output format.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.generate.traces import Trace

_STEP = 64  # lengths of batches are multiples of this


TokenWeights = Callable[[Trace], Int[np.ndarray, "completion"]]
"""Weights of a trace's completion tokens, positive whole numbers; those of other traces are on the same scale."""


def alike(trace: Trace) -> Int[np.ndarray, "completion"]:
    """The weight 1 for every completion token."""
    return np.ones(len(trace.completion), np.int64)


class MicroBatch(NamedTuple):
    """Traces of similar length, padded on the right.

    Attributes:
      tokens: prompt and completion; rows past the last trace are padding.
      valid: positions that hold a token.
      loss_weight: weight of each completion token over that of the trace's whole completion, at the position before the
        token, else 0. A weighted sum over a row is the weighted mean over the trace's completion.
      lengths: tokens of each trace, 0 for padding rows.
      ids: index of the trace in each row, -1 for padding rows.
      task_weight: weight of each trace, such that all tasks weigh the same and the mean over traces is 1; 0 for padding
        rows.
    """

    tokens: Int[Array, "rows seq"]
    valid: Bool[Array, "rows seq"]
    loss_weight: Float[Array, "rows seq"]
    lengths: Int[Array, "rows"]
    ids: Int[np.ndarray, "rows"]
    task_weight: Float[Array, "rows"]


def micro_batches(
    traces: Iterable[Trace],
    *,
    tokens_per_batch: int = 4096,
    smallest: int = 128,
    longest: int = 0,
    weigh: TokenWeights = alike,
) -> list[MicroBatch]:
    """Groups traces by length, doubling from `smallest`, into batches of about `tokens_per_batch`.

    All batches of one length have the same shape, so that few programs are compiled. The last group is as long as
    its longest trace, or `longest` if that is more, so that parts of a set get the shapes of the whole set.
    """
    groups: dict[int, list[tuple[int, Trace]]] = defaultdict(list)
    traces = list(traces)
    of_task = Counter(trace.task for trace in traces)
    weights = {task: len(traces) / (count * len(of_task)) for task, count in of_task.items()}
    for number, trace in enumerate(traces):
        length = smallest
        while length < len(trace.prompt) + len(trace.completion):
            length *= 2
        groups[length].append((number, trace))
    batches = []
    for length, members in sorted(groups.items()):
        # The last group need not be as long as the next power of two.
        most = max(longest, *(len(t.prompt) + len(t.completion) for _, t in members))
        rows, length = longest_batch(min(length, most), tokens_per_batch)
        batches += [_pad(members[i : i + rows], rows, length, weights, weigh) for i in range(0, len(members), rows)]
    return batches


def longest_batch(tokens: int, tokens_per_batch: int = 4096) -> tuple[int, int]:
    """Rows and positions of a batch whose longest trace has `tokens` tokens."""
    length = -(-tokens // _STEP) * _STEP
    return max(1, tokens_per_batch // length), length


def _pad(
    members: Sequence[tuple[int, Trace]], rows: int, length: int, weights: Mapping[str, float], weigh: TokenWeights
) -> MicroBatch:
    tokens = np.zeros((rows, length), np.int32)
    weight = np.zeros((rows, length), np.float32)
    lengths = np.zeros(rows, np.int32)
    numbers = np.full(rows, -1, np.int32)
    task_weight = np.zeros(rows, np.float32)
    for row, (number, trace) in enumerate(members):
        numbers[row] = number
        ids = (*trace.prompt, *trace.completion)
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        task_weight[row] = weights[trace.task]
        of_tokens = weigh(trace)
        weight[row, len(trace.prompt) - 1 : len(ids) - 1] = of_tokens / of_tokens.sum()
    valid = np.arange(length) < lengths[:, None]
    arrays = [jnp.asarray(x) for x in (tokens, valid, weight, lengths)]
    return MicroBatch(*arrays, ids=numbers, task_weight=jnp.asarray(task_weight))
