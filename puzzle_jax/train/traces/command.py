"""`puzzle train traces`: a parent's own answers, on which its children are distilled.

Problems come from the split "training", which shares none with the splits of a search; see
`evaluate.accuracy.QuestionSet` for what it shares with the evaluation of a user's own file of prompts. The file appears
once all answers are complete; after an interruption, `puzzle run` continues from the answers that it had. Left out:
several processes; run each with a seed and a file of its own.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import MOST_TOGETHER, ConfigError, PuzzleError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.journal import journaled_answers
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.settings import BY_EFFORT, Asked
from puzzle_jax.evaluate.statistics import summarise
from puzzle_jax.files import PARTIAL
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.progress import progress
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.tasks import FiniteTask, get_task
from puzzle_jax.train.traces.examples import SUFFIXES

SPLIT = "training"


@dataclass(frozen=True, kw_only=True)
class AnswersSettings(Asked):
    """Settings of one file of answers.

    Attributes:
      parent: checkpoint of the model that answers.
      out: file to write, .parquet or .jsonl.
      problems: number of problems of each task, each asked at every effort; or a number by effort
        (low=3000,medium=1000,high=1000), where a smaller number takes a subset of the same problems.
      batch_size: number of answers generated together.
      mesh: devices over which batch and weights are spread.
      weights: how weights are held: packed, dense, or auto (see `model.weights`).
    """

    parent: Path
    out: Path
    problems: Mapping[str, int] = field(metadata=BY_EFFORT)
    batch_size: int = 64
    mesh: MeshSettings = field(default_factory=MeshSettings)
    weights: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("batch_size", self.batch_size, 1, MOST_TOGETHER)
        for effort in self.efforts:
            check_range(f"problems.{effort}", self.problems.get(effort, 0), 1)
        self.mesh.check_without("train traces", "sequence", "processes")


def run(settings: AnswersSettings, console: Console | None = None, journal: Path | None = None) -> None:
    """Asks the problems and writes the file of answers.

    Args:
      journal: file that keeps answers as they come, and from which those of an earlier call with the same settings are
        reused; None keeps none.

    Raises PuzzleError for any unusable input, before weights are read.
    """
    console = console or plain_console(stderr=True)
    questions = QuestionSet(settings.tasks, settings.efforts, settings.problems, SPLIT, settings.seed)
    limits = settings.max_tokens
    _check_out(settings.out)
    mesh = make_mesh(settings.mesh.data, settings.mesh.model) if settings.mesh.devices > 1 else None
    model = replace(Model.open("parent", settings.parent, datetime.datetime.now(), settings.weights), mesh=mesh)
    asked = questions.questions()
    check_context(asked, model.chat, model.config, limits, "the parent")
    for name in questions.tasks:
        if isinstance(get_task(name), FiniteTask):
            console.print(f"{name}: evaluate asks all its rows, so evaluate what learns from it on another file")

    def ask(**changes: Any) -> list[Trace]:
        return answer_questions(
            model.params,
            model.config,
            model.chat,
            questions,
            max_tokens=limits,
            temperature=settings.temperature,
            slots=settings.batch_size,
            mesh=mesh,
            **changes,
        )

    with progress(console, "answering", len(asked)) as advance:
        if journal is None:
            traces = ask(on_answer=lambda *_: advance(1))
        else:
            traces = journaled_answers(journal, asked, ask, on_answers=advance)
    beside = settings.out.with_name(f".{settings.out.stem}{PARTIAL}{os.getpid()}{settings.out.suffix}")
    write_traces(beside, traces)
    beside.replace(settings.out)
    console.print(_table(traces))
    if note := unscored_note(traces):
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"{len(traces)} traces: {settings.out}", highlight=False, soft_wrap=True)


def _check_out(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"out is {out}, but must end in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise ConfigError(f"out is {out}, which exists already; remove it or name another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PuzzleError(f"out is {out}, whose directory cannot be made: {error}") from None


def _table(traces: Sequence[Trace]) -> Table:
    table = Table("task", "effort", "answers", "accuracy", "mean tokens", "ended by the limit")
    kinds = dict.fromkeys((trace.task, trace.effort) for trace in traces)
    for task, effort in kinds:
        of = summarise([trace for trace in traces if (trace.task, trace.effort) == (task, effort)])
        shares = f"{of.accuracy:.1%}", f"{of.mean_tokens:.0f}", f"{of.truncated:.1%}"
        table.add_row(task, effort, str(of.answers), *shares)
    return table
