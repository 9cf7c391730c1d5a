"""`puzzle train traces`: a parent's own answers, which its children are distilled on.

Problems come from the split "training", which shares none with the splits of a search; see
`evaluate.accuracy.QuestionSet` for what it shares with the evaluation of a user's own file of prompts. The file appears
when all answers are there. Left out: going on after an interrupt, and several processes; give each a seed and a file of
its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.token_ids import check_tokenizer
from puzzle_jax.errors import MOST_TOGETHER, ConfigError, PuzzleError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.settings import Asked
from puzzle_jax.files import PARTIAL
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.model.network import compute_dtype, to_compute
from puzzle_jax.model.sharding import make_mesh, shard_params
from puzzle_jax.model.spec import Params
from puzzle_jax.progress import progress
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.tasks import Chat, FiniteTask, get_task
from puzzle_jax.train.traces.examples import SUFFIXES

SPLIT = "training"


@dataclass(frozen=True, kw_only=True)
class AnswersSettings(Asked):
    """One file of answers.

    Attributes:
      parent: checkpoint that answers.
      out: file to make, .parquet or .jsonl.
      problems: of each task, every one asked at every effort.
      batch_size: answers generated together.
      mesh: devices to spread batch and weights over.
    """

    parent: Path
    out: Path
    problems: int
    batch_size: int = 64
    mesh: MeshSettings = field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("batch_size", self.batch_size, 1, MOST_TOGETHER)
        self.mesh.check_without("train traces", "sequence", "processes")


def run(settings: AnswersSettings, console: Console | None = None) -> None:
    """Asks, and writes the file.

    Raises PuzzleError for whatever cannot be used, before any weight is read.
    """
    console = console or plain_console(stderr=True)
    questions = QuestionSet(settings.tasks, settings.efforts, settings.problems, SPLIT, settings.seed)
    limits = settings.max_tokens
    _check_out(settings.out)
    config = describe_checkpoint(settings.parent).config
    chat = Chat.load(settings.parent)
    check_tokenizer(settings.parent, chat.tokenizer, config.vocab_size)
    asked = questions.questions()
    check_context(asked, chat, config, limits, "the parent")
    mesh = make_mesh(settings.mesh.data, settings.mesh.model) if settings.mesh.devices > 1 else None
    for name in questions.tasks:
        if isinstance(get_task(name), FiniteTask):
            console.print(f"{name}: evaluate asks all its rows, so judge what learns from it on another file")

    params = _params(settings.parent, config, mesh)
    with progress(console, "answering", len(asked)) as advance:
        traces = answer_questions(
            params,
            config,
            chat,
            questions,
            max_tokens=limits,
            temperature=settings.temperature,
            slots=settings.batch_size,
            mesh=mesh,
            on_answer=lambda *_: advance(1),
        )
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


def _params(directory: Path, config: ModelConfig, mesh: Mesh | None) -> Params:
    """Dense weights to compute with, over the mesh where there is one."""
    loaded = load_checkpoint(directory, mesh=mesh).params
    dense = jax.jit(to_compute, static_argnums=1)(loaded, compute_dtype())
    return dense if mesh is None else shard_params(dense, config, mesh)


def _table(traces: Sequence[Trace]) -> Table:
    table = Table("task", "effort", "answers", "right", "mean tokens", "ended by the limit")
    kinds = dict.fromkeys((trace.task, trace.effort) for trace in traces)
    for task, effort in kinds:
        of_kind = [trace for trace in traces if (trace.task, trace.effort) == (task, effort)]
        right = sum(trace.correct for trace in of_kind) / len(of_kind)
        tokens = sum(len(trace.completion) for trace in of_kind) / len(of_kind)
        cut = sum(trace.truncated for trace in of_kind) / len(of_kind)
        table.add_row(task, effort, str(len(of_kind)), f"{right:.1%}", f"{tokens:.0f}", f"{cut:.1%}")
    return table
