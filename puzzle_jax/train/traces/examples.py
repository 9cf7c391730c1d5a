"""From files of traces to examples that fit a row: everything that cannot be learnt from is refused or counted here.

All examples are held in memory, four bytes per token. Chosen experts and log-probabilities that traces may carry are
left out. Traces of text are rendered by the chat template, which may write today's date: a run that is resumed on
another day needs a `Chat` with the same `today`, or its prompts change.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace, read_traces
from puzzle_jax.tasks import Chat
from puzzle_jax.train.rows import Example
from puzzle_jax.train.traces.settings import DataSettings

SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True, eq=False, kw_only=True)
class TraceExample(Example):
    """An example with its task and effort."""

    task: str
    effort: str


class Counts(NamedTuple):
    """How many traces were kept (some of them cut), and how many dropped for each reason, the first that applies.

    `longest` is the number of tokens in the longest trace, prompt included, kept or not.
    """

    traces: int = 0
    kept: int = 0
    cut: int = 0
    over_long: int = 0
    truncated: int = 0
    short: int = 0
    longest: int = 0

    def __str__(self) -> str:
        reasons = (
            (self.over_long, "longer than a row"),
            (self.truncated, "ended by a limit"),
            (self.short, "with too short an answer"),
        )
        dropped = "".join(f", {number} dropped that are {reason}" for number, reason in reasons if number)
        return (
            f"{self.kept} of {self.traces} traces kept" + (f" ({self.cut} of them cut)" if self.cut else "") + dropped
        )


class TraceExamples(NamedTuple):
    """Examples in the order of their traces, and what was dropped."""

    examples: tuple[TraceExample, ...]
    counts: Counts


def read_examples(
    paths: Sequence[Path], settings: DataSettings, vocab_size: int, chat: Chat | None = None
) -> TraceExamples:
    """Reads the examples in files of traces.

    Args:
      paths: .parquet or .jsonl files, or directories whose files of these names are read in order of name.
      settings: what is kept; weights, seed and the number of rows are not used.
      chat: turns rows of text into tokens, and recognises truncated answers in files without that field.

    Raises:
      PuzzleError: a file cannot be read, or holds no trace or one that the model cannot have written; there is no file,
        or one is named twice; an over-long example is refused; or no example is left.
    """
    files = trace_files(paths)
    named = ((f"{path}, trace {n}", t) for path in files for n, t in enumerate(read_traces(path, chat), 1))
    return examples_of(named, settings, vocab_size, ", ".join(map(str, paths)))


def trace_files(paths: Sequence[Path]) -> list[Path]:
    """The files that paths name: themselves, or those in a directory, in order of name.

    Raises PuzzleError for a directory without any, or a file that is named twice, which would count double.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = [p for p in sorted(path.iterdir()) if p.suffix in SUFFIXES and not p.name.startswith(".")]
            if not found:
                raise PuzzleError(f"{path} holds no file of traces, .parquet or .jsonl")
            files += found
        else:
            files.append(path)
    seen: set[Path] = set()
    for path in files:
        if path.resolve() in seen:
            raise PuzzleError(f"traces names {path} twice, but every file must come once")
        seen.add(path.resolve())
    return files


def examples_of(
    named: Iterable[tuple[str, Trace]], settings: DataSettings, vocab_size: int, source: str
) -> TraceExamples:
    """The examples of traces, which come with their names in messages; `source` names all of them."""
    examples: list[TraceExample] = []
    traces = cut = over_long = truncated = short = longest = 0
    shortest: int | None = None
    for where, trace in named:
        traces += 1
        tokens = _tokens(trace, vocab_size, where)
        longest = max(longest, len(tokens))
        if trace.truncated and not settings.keep_truncated:
            truncated += 1
            continue
        if len(trace.completion) < settings.min_completion:
            short += 1
            continue
        # Tokens that must fit into the row for the example to be kept.
        needed = len(trace.prompt) + settings.min_completion if settings.over_long == "cut" else len(tokens)
        shortest = needed if shortest is None else min(shortest, needed)
        if len(tokens) > settings.row_length:
            if settings.over_long == "refuse":
                raise PuzzleError(f"{where} has {len(tokens)} tokens, but row_length is {settings.row_length}")
            if needed > settings.row_length:
                over_long += 1
                continue
            cut += 1
            tokens = tokens[: settings.row_length].copy()
        examples.append(TraceExample(tokens, len(trace.prompt), task=trace.task, effort=trace.effort))
    counts = Counts(traces, len(examples), cut, over_long, truncated, short, longest)
    if not examples and shortest is not None:
        raise PuzzleError(f"row_length is {settings.row_length}, but the shortest example of {source} needs {shortest}")
    if not examples:
        raise PuzzleError(f"{source} leaves nothing to train on: {counts}")
    return TraceExamples(tuple(examples), counts)


def _tokens(trace: Trace, vocab_size: int, where: str) -> np.ndarray:
    for name in ("prompt", "completion"):
        if not getattr(trace, name):
            raise PuzzleError(f"{where} has no {name}, but must have at least one token of it")
    for worst in (max(*trace.prompt, *trace.completion), min(*trace.prompt, *trace.completion)):
        if not 0 <= worst < vocab_size:  # checked here, since an int32 array cannot hold larger ones
            raise PuzzleError(f"{where} holds token {worst}, but the model's tokens are 0 to {vocab_size - 1}")
    return np.array([*trace.prompt, *trace.completion], np.int32)
