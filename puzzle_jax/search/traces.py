"""Traces: the parent's own answers, from which everything else is learnt, and their batches.

Ranking and scoring look at what the parent writes, its reasoning included; calibrating on prompts alone is known to
destroy a child's output format. A trace file is parquet with one row per answer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import Answer

COLUMNS = ("task", "effort", "seed", "details", "prompt", "completion", "reward", "truncated", "length")


def write_traces(path: Path, answers: Sequence[Answer]) -> None:
    """Writes answers as one parquet file; `length` counts prompt and completion tokens."""
    rows = [
        {
            "task": a.task,
            "effort": a.effort,
            "seed": a.problem_seed,
            "details": json.dumps(dict(a.details)),
            "prompt": list(a.prompt),
            "completion": list(a.completion),
            "reward": float(a.correct),
            "truncated": a.truncated,
            "length": len(a.prompt) + len(a.completion),
        }
        for a in answers
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def read_traces(path: Path) -> list[Answer]:
    """Reads a trace file; raises PuzzleError when it is none, or empty."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise PuzzleError(f"{path} cannot be read as a parquet file of traces: {error}") from error
    missing = set(COLUMNS) - set(table.column_names)
    if missing:
        raise PuzzleError(f"{path} has no column {', '.join(sorted(missing))}, which a trace file must have")
    if not table.num_rows:
        raise PuzzleError(f"{path} holds no trace")
    return [
        Answer(
            task=row["task"],
            effort=row["effort"],
            problem_seed=row["seed"],
            details=json.loads(row["details"]),
            prompt=tuple(row["prompt"]),
            completion=tuple(row["completion"]),
            correct=row["reward"] > 0.5,
            truncated=row["truncated"],
        )
        for row in table.to_pylist()
    ]


class MicroBatch(NamedTuple):
    """Traces of similar length, padded on the right.

    Attributes:
      tokens: prompt and completion; rows past the last trace are padding.
      valid: positions that hold a token.
      loss_weight: for the position before each completion token, 1 / completion tokens of its trace; else 0. A
        weighted sum over a row is the trace's mean over its completion.
      lengths: tokens of each trace, 0 for padding rows.
    """

    tokens: Int[Array, "rows seq"]
    valid: Bool[Array, "rows seq"]
    loss_weight: Float[Array, "rows seq"]
    lengths: Int[Array, "rows"]


def micro_batches(traces: Iterable[Answer], *, tokens_per_batch: int = 4096, smallest: int = 128) -> list[MicroBatch]:
    """Groups traces by length, doubling from `smallest`, into batches of about `tokens_per_batch`.

    All batches of one length have the same shape, so that few programs are compiled.
    """
    groups: dict[int, list[Answer]] = defaultdict(list)
    for trace in traces:
        length = smallest
        while length < len(trace.prompt) + len(trace.completion):
            length *= 2
        groups[length].append(trace)
    batches = []
    for length, members in sorted(groups.items()):
        # The last group need not be as long as the next power of two.
        longest = max(len(t.prompt) + len(t.completion) for t in members)
        length = min(length, -(-longest // 64) * 64)
        rows = max(1, tokens_per_batch // length)
        batches += [_pad(members[i : i + rows], rows, length) for i in range(0, len(members), rows)]
    return batches


def _pad(traces: Sequence[Answer], rows: int, length: int) -> MicroBatch:
    tokens = np.zeros((rows, length), np.int32)
    weight = np.zeros((rows, length), np.float32)
    lengths = np.zeros(rows, np.int32)
    for row, trace in enumerate(traces):
        ids = (*trace.prompt, *trace.completion)
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        weight[row, len(trace.prompt) - 1 : len(ids) - 1] = 1.0 / len(trace.completion)
    valid = np.arange(length) < lengths[:, None]
    return MicroBatch(*(jnp.asarray(x) for x in (tokens, valid, weight, lengths)))
