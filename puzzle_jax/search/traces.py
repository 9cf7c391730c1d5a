"""The traces of a search: the parent's own answers, in sets that share no prompt.

Either the parent is asked the recipe's tasks, or traces that it generated elsewhere are split into the sets.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from rich.console import Console

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, unscored_note
from puzzle_jax.evaluate.journal import journaled_answers
from puzzle_jax.evaluate.models import Model
from puzzle_jax.generate.traces import Trace
from puzzle_jax.progress import progress
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.tasks.context import check_fits


def ask_parent(parent: Model, recipe: Recipe, kept: Path, console: Console) -> Iterator[tuple[str, Sequence[Trace]]]:
    """Yields the sets by name, with the parent's answers; answers that a killed run left in `kept` are not generated
    again.
    """
    settings = recipe.traces
    sets = {
        name: QuestionSet(settings.tasks, settings.efforts, problems, name, settings.seed)
        for name, problems in recipe.trace_sets.items()
    }
    with progress(console, "answering", sum(len(s.questions()) for s in sets.values())) as advance:
        for name, questions in sets.items():
            ask = partial(
                answer_questions,
                parent.params,
                parent.config,
                parent.chat,
                questions,
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                slots=settings.batch_size,
                mesh=parent.mesh,
            )
            answers = journaled_answers(
                kept / f"{name}.jsonl",
                questions.questions(),
                ask,
                on_answers=advance,
            )
            if note := unscored_note(answers):
                console.print(f"{name}: {note}", highlight=False, soft_wrap=True)
            yield name, answers


def ended(traces: Sequence[Trace], name: str) -> list[Trace]:
    """The answers of a set that ended by themselves. Raises PuzzleError where none did."""
    found = [trace for trace in traces if not trace.truncated]
    if not found:
        raise PuzzleError(
            f"traces.ended_only is true, but none of the {len(traces)} {name} traces ended by itself; "
            "allow longer answers"
        )
    return found


def split_traces(
    traces: Sequence[Trace], shares: Mapping[str, int], config: ModelConfig, source: Path, seed: int = 0
) -> dict[str, list[Trace]]:
    """Sets of traces by name, each with its share of the prompts, in the order of a hash of the prompt and the seed.

    Every set gets at least one prompt, so that a short file suffices for a search; `shares` are relative to their sum.
    Raises PuzzleError, naming the file `source` and the trace, for a trace that the parent cannot have written, and
    where there are fewer prompts than sets.
    """
    for number, trace in enumerate(traces):
        _check(trace, config, f"{source}: trace {number}")
    prompts = sorted({trace.prompt for trace in traces}, key=lambda prompt: (_hash(seed, prompt), prompt))
    if len(prompts) < len(shares):
        raise PuzzleError(
            f"{source} holds {len(prompts)} different prompts, but a search splits them into {', '.join(shares)}, each "
            f"with prompts of its own; give at least {len(shares)}"
        )
    # Every set gets one prompt, and its share of the others.
    ends = np.array(list(accumulate(shares.values()))) / sum(shares.values())
    counts = np.diff(np.rint(ends * (len(prompts) - len(shares))), prepend=0).astype(int) + 1
    owners = [name for name, count in zip(shares, counts, strict=True) for _ in range(count)]
    owner = dict(zip(prompts, owners, strict=True))
    found: dict[str, list[Trace]] = {name: [] for name in shares}
    for trace in traces:
        found[owner[trace.prompt]].append(trace)
    return found


def _hash(seed: int, prompt: Sequence[int]) -> int:
    return zlib.crc32(f"{seed} {tuple(prompt)}".encode())


def _check(trace: Trace, config: ModelConfig, where: str) -> None:
    if not trace.prompt or not trace.completion:
        raise PuzzleError(f"{where} has no {'completion' if trace.prompt else 'prompt'}")
    check_fits(where, len(trace.prompt), len(trace.completion), config.max_position, "the parent")
    most = max(*trace.prompt, *trace.completion)
    if most >= config.vocab_size or min(*trace.prompt, *trace.completion) < 0:
        raise PuzzleError(f"{where} holds token {most}, but the parent's tokens are 0 to {config.vocab_size - 1}")
