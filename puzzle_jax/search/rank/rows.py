"""Rows of a fixed length filled with whole traces, one after another: the form in which the statistics pass reads them.

A ranking needs sums over tokens and nothing by trace, so traces need not lie in rows of their own. Packed, almost every
position holds a token, and all rows have one length, so that each program of the pass is compiled once. Segment ids
keep attention within a trace and positions restart at 0: a token has the hidden states that it would have alone.

Attention to a long row of short traces would be wasted work, so only traces of up to `SHORT` tokens share a row length;
longer ones have rows of the next power of two, or of the longest trace if that is less.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from puzzle_jax.generate.traces import Trace

SHORT = 1024
"""Traces of up to so many tokens are packed into rows of one length."""

_LEAST = 64


class PackedTraces(NamedTuple):
    """Some rows of packed traces.

    Attributes:
      tokens: token ids; 0 in padding.
      segment_ids: number of the trace within its row, from 1; 0 marks padding.
      positions: position within the trace, from 0; 0 in padding.
      weight: share of each token in the means over tokens, such that every trace of a task weighs the same however long
        it is, every task weighs the same however many traces it has, and all tokens of all rows sum to the number of
        traces; 0 in padding.
    """

    tokens: Int[Array, "rows seq"]
    segment_ids: Int[Array, "rows seq"]
    positions: Int[Array, "rows seq"]
    weight: Float[Array, "rows seq"]


def packed_traces(traces: Iterable[Trace], tokens_per_batch: int = 4096) -> list[PackedTraces]:
    """Packs traces into batches of about `tokens_per_batch` tokens, which is at least one row."""
    traces = list(traces)
    of_task = Counter(trace.task for trace in traces)
    shares = {task: len(traces) / (count * len(of_task)) for task, count in of_task.items()}
    batches = []
    for length, members in sorted(_by_length(traces).items()):
        filled, rows = _filled(members, length), batch_rows(length, tokens_per_batch)
        batches += [_batch(filled[start : start + rows], rows, length, shares) for start in range(0, len(filled), rows)]
    return batches


def batch_rows(length: int, tokens_per_batch: int = 4096) -> int:
    """The number of rows of a batch whose rows have `length` tokens."""
    return max(1, tokens_per_batch // length)


def row_length(longest: int) -> int:
    """The length of the rows of traces of which the longest has `longest` tokens."""
    if longest > SHORT:
        return -(-longest // _LEAST) * _LEAST
    return max(_LEAST, _power_of_two(longest))


def _power_of_two(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()


def _by_length(traces: Sequence[Trace]) -> dict[int, list[Trace]]:
    """Traces by the length of their rows."""
    longest = row_length(max((_tokens(trace) for trace in traces), default=1))
    groups: dict[int, list[Trace]] = defaultdict(list)
    for trace in traces:
        groups[min(max(SHORT, _power_of_two(_tokens(trace))), longest)].append(trace)
    return groups


def _filled(traces: Sequence[Trace], length: int) -> list[list[Trace]]:
    """Rows of traces: the longest first, each in the first row with room for it (first-fit decreasing)."""
    rows: list[list[Trace]] = []
    room: list[int] = []
    for trace in sorted(traces, key=_tokens, reverse=True):
        size = _tokens(trace)
        row = next((row for row, free in enumerate(room) if free >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(trace)
        room[row] -= size
    return rows


def _tokens(trace: Trace) -> int:
    return len(trace.prompt) + len(trace.completion)


def _batch(filled: Sequence[Sequence[Trace]], rows: int, length: int, shares: dict[str, float]) -> PackedTraces:
    tokens, segments, positions = (np.zeros((rows, length), np.int32) for _ in range(3))
    weight = np.zeros((rows, length), np.float32)
    for row, members in enumerate(filled):
        start = 0
        for number, trace in enumerate(members, start=1):
            size = _tokens(trace)
            here = slice(start, start + size)
            tokens[row, here] = (*trace.prompt, *trace.completion)
            segments[row, here], positions[row, here] = number, np.arange(size)
            weight[row, here] = shares[trace.task] / size
            start += size
    return PackedTraces(*map(jnp.asarray, (tokens, segments, positions, weight)))
