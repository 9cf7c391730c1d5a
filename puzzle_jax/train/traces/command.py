"""`python -m puzzle_jax.train traces`: a parent's own answers, which its children are distilled on.

Problems come from the split "training", which shares none with the splits of a search; see
`evaluate.accuracy.QuestionSet` for what it shares with the evaluation of a user's own file of prompts. The file appears
when all answers are there. Left out: going on after an interrupt, and several processes; give each a seed and a file of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.token_ids import check_tokenizer
from puzzle_jax.errors import MOST_TOGETHER, ConfigError, PuzzleError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.settings import MAX_TOKENS
from puzzle_jax.files import PARTIAL
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.model.network import compute_dtype, to_compute
from puzzle_jax.model.sharding import make_mesh, shard_params
from puzzle_jax.model.spec import Params
from puzzle_jax.progress import progress
from puzzle_jax.tasks import EFFORTS, TASKS, Chat, FiniteTask, check_effort, get_task
from puzzle_jax.temperature import check_temperature
from puzzle_jax.train.traces.examples import SUFFIXES

SPLIT = "training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""

    def add(flag: str, *, help: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(flag, help=help + shown, **options)

    add("--parent", type=Path, required=True, metavar="DIR", help="checkpoint that answers")
    add("--out", type=Path, required=True, metavar="FILE", help="file to make, .parquet or .jsonl")
    add("--problems", type=int, required=True, metavar="N", help="of each task, every one asked at every effort")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="families, or .jsonl files of prompts")
    add("--efforts", nargs="+", default=list(EFFORTS), metavar="EFFORT", help="reasoning efforts")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy")
    add("--seed", type=int, default=0, help="draws other problems and other answers")
    add(
        "--max-tokens",
        default=json.dumps(dict(MAX_TOKENS)),
        metavar="JSON",
        help="limit of an answer: a number, or one by effort; the defaults suit the embedded parent",
    )
    add("--batch-size", type=int, default=64, metavar="N", help="answers generated together")
    add("--mesh", default="1,1", metavar="DATA,MODEL", help="devices to spread batch and weights over")


def run(options: argparse.Namespace, console: Console) -> None:
    """Asks, and writes the file.

    Raises PuzzleError for whatever cannot be used, before any weight is read.
    """
    questions = _questions(options)
    limits = answer_limits(options.max_tokens, questions.efforts)
    _check_numbers(options)
    _check_out(options.out)
    config = describe_checkpoint(options.parent).config
    chat = Chat.load(options.parent)
    check_tokenizer(options.parent, chat.tokenizer, config.vocab_size)
    asked = questions.questions()
    check_context(asked, chat, config, limits, "the parent")
    mesh = _mesh(options.mesh)
    for name in questions.tasks:
        if isinstance(get_task(name), FiniteTask):
            console.print(f"{name}: evaluate asks all its rows, so judge what learns from it on another file")

    params = _params(options.parent, config, mesh)
    with progress(console, "answering", len(asked)) as advance:
        traces = answer_questions(
            params,
            config,
            chat,
            questions,
            max_tokens=limits,
            temperature=options.temperature,
            slots=options.batch_size,
            mesh=mesh,
            on_answer=lambda *_: advance(1),
        )
    beside = options.out.with_name(f".{options.out.stem}{PARTIAL}{os.getpid()}{options.out.suffix}")
    write_traces(beside, traces)
    beside.replace(options.out)
    console.print(_table(traces))
    if note := unscored_note(traces):
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"{len(traces)} traces: {options.out}", highlight=False, soft_wrap=True)


def _questions(options: argparse.Namespace) -> QuestionSet:
    for name in ("tasks", "efforts"):
        values = getattr(options, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"--{name} is {' '.join(values)}, but must name each once")
    return QuestionSet(tuple(options.tasks), tuple(options.efforts), options.problems, SPLIT, options.seed)


def answer_limits(text: str, efforts: Sequence[str]) -> dict[str, int]:
    """The limit of every effort; those that are not named keep their defaults."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--max-tokens is {text!r}, which is no valid JSON: {error}") from None
    by_effort = given if isinstance(given, dict) else dict.fromkeys(efforts, given)
    limits = {**MAX_TOKENS, **{check_effort(effort): limit for effort, limit in by_effort.items()}}
    for limit in limits.values():
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"--max-tokens is {text}, but must be a whole number of at least 1, or one by effort")
    return limits


def _check_numbers(options: argparse.Namespace) -> None:
    check_temperature("--temperature", options.temperature)
    check_range("--batch-size", options.batch_size, 1, MOST_TOGETHER)


def _check_out(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out is {out}, but must end in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise ConfigError(f"--out is {out}, which exists already; remove it or name another file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PuzzleError(f"--out is {out}, whose directory cannot be made: {error}") from None


def _mesh(text: str) -> Mesh | None:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--mesh is {text!r}, but must be two numbers of devices, DATA,MODEL")
    data, model = map(int, parts)
    return None if data == model == 1 else make_mesh(data, model)


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
