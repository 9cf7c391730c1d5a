"""Traces: prompts with what a model answered, the one form in which answers are kept, judged and learnt from.

A trace file is parquet with one row per answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from puzzle_jax.errors import PuzzleError

COLUMNS = ("task", "effort", "seed", "details", "prompt", "completion", "reward", "truncated", "length")


@dataclass(frozen=True)
class Trace:
    """One answered question.

    Attributes:
      task, effort: what was asked and how hard the model should think.
      problem_seed: draws the problem again from its task.
      details: what makes the problem hard, as whole numbers.
      prompt, completion: token ids; the completion ends in a stop id unless it is truncated.
      reward: from 0 to 1, which is right.
      truncated: whether the token limit ended the completion.
    """

    task: str
    effort: str
    problem_seed: int
    details: Mapping[str, int]
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    reward: float
    truncated: bool

    @property
    def correct(self) -> bool:
        """Whether the answer earns full reward."""
        return self.reward >= 1.0


def write_traces(path: Path, traces: Sequence[Trace]) -> None:
    """Writes traces as one parquet file; `length` counts prompt and completion tokens."""
    rows = [
        {
            "task": trace.task,
            "effort": trace.effort,
            "seed": trace.problem_seed,
            "details": json.dumps(dict(trace.details)),
            "prompt": list(trace.prompt),
            "completion": list(trace.completion),
            "reward": trace.reward,
            "truncated": trace.truncated,
            "length": len(trace.prompt) + len(trace.completion),
        }
        for trace in traces
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)


def read_traces(path: Path) -> list[Trace]:
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
        Trace(
            task=row["task"],
            effort=row["effort"],
            problem_seed=row["seed"],
            details=json.loads(row["details"]),
            prompt=tuple(row["prompt"]),
            completion=tuple(row["completion"]),
            reward=row["reward"],
            truncated=row["truncated"],
        )
        for row in table.to_pylist()
    ]
