"""`python -m puzzle_jax.train average`: the weights of two policies of one start become one model.

With `--weight` that is all. With `--weights` each of several averages answers problems first, a table shows what each
gains and costs, and the one that `average_sweep` chooses is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from puzzle_jax.errors import MOST_TOGETHER, ConfigError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet
from puzzle_jax.evaluate.settings import MAX_TOKENS
from puzzle_jax.tasks import EFFORTS, TASKS
from puzzle_jax.temperature import check_temperature
from puzzle_jax.train.average.sweep import SPLIT, Sweep, run_sweep
from puzzle_jax.train.average.weights import Pair, check_out, check_weight, write_average
from puzzle_jax.train.traces.command import answer_limits

_SLOTS = 64
_OF_SWEEP = ("problems", "tasks", "efforts", "max_tokens", "reference", "temperature", "seed", "batch_size")
"""Options that only a sweep reads; absent ones are None, so that none is given in vain."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""

    def add(flag: str, **options: Any) -> None:
        parser.add_argument(flag, **options)

    add("a", type=Path, metavar="A", help="checkpoint of a policy")
    add("b", type=Path, metavar="B", help="checkpoint of another policy from the same start")
    add("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    add("--weight", type=float, metavar="W", help="of B: 0 is A alone, 1 is B alone")
    add("--weights", type=float, nargs="+", metavar="W", help="in place of --weight: tried on problems, one is kept")
    add("--problems", type=int, metavar="N", help="for --weights: of each task, every one asked at every effort")
    add("--tasks", nargs="+", metavar="TASK", help=f"families, or .jsonl files of prompts (default: {' '.join(TASKS)})")
    add("--efforts", nargs="+", metavar="EFFORT", help=f"reasoning efforts (default: {' '.join(EFFORTS)})")
    add(
        "--max-tokens",
        metavar="JSON",
        help=f"limit of an answer: a number, or one by effort (default: {json.dumps(dict(MAX_TOKENS))})",
    )
    add("--reference", type=Path, metavar="DIR", help="checkpoint whose mean tokens are the limit (default: no limit)")
    add("--temperature", type=float, metavar="T", help="of sampling; 0 is greedy (default: 0)")
    add("--seed", type=int, metavar="S", help="draws other problems (default: 0)")
    add("--batch-size", type=int, metavar="N", help=f"answers generated together (default: {_SLOTS})")


def run(options: argparse.Namespace, console: Console) -> None:
    """Averages, with a weight that is given or found.

    Raises PuzzleError for whatever cannot be used, before weights are averaged and anything is written.
    """
    _check_options(options)
    pair = Pair.open(options.a, options.b)
    others = {"A": options.a, "B": options.b} | ({"--reference": options.reference} if options.reference else {})
    check_out(options.out, others)
    sweep = None if options.weights is None else _sweep(options, pair)
    console.print(f"{len(pair.differing)} parameters differ, and are averaged", highlight=False)
    weight, found = options.weight, None
    if sweep is not None:
        swept = run_sweep(pair, sweep, console)
        console.print(swept.table())
        weight, found = swept.choice.weight, swept.record()
        console.print(f"weight {weight:g}: {swept.choice.why}", highlight=False)
    write_average(pair, weight, options.out, sweep=found)
    console.print(f"average with weight {weight:g}: {options.out}", highlight=False, soft_wrap=True)


def _check_options(options: argparse.Namespace) -> None:
    if (options.weight is None) == (options.weights is None):
        given = "neither is" if options.weight is None else "both are"
        raise ConfigError(f"one of --weight and --weights must be given, but {given}")
    if options.weight is not None:
        check_weight("--weight", options.weight)
        for name in _OF_SWEEP:
            if getattr(options, name) is not None:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is given with --weight, but only --weights asks problems")
    elif options.problems is None:
        raise ConfigError("--weights is given without --problems, the number of problems of each task to ask")
    if options.temperature is not None:
        check_temperature("--temperature", options.temperature)
    if options.batch_size is not None:
        check_range("--batch-size", options.batch_size, 1, MOST_TOGETHER)


def _sweep(options: argparse.Namespace, pair: Pair) -> Sweep:
    tasks, efforts = tuple(options.tasks or TASKS), tuple(options.efforts or EFFORTS)
    for name, values in (("tasks", tasks), ("efforts", efforts)):
        if len(set(values)) < len(values):
            raise ConfigError(f"--{name} is {' '.join(values)}, but must name each once")
    questions = QuestionSet(tasks, efforts, options.problems, SPLIT, options.seed or 0)
    limits = answer_limits("{}" if options.max_tokens is None else options.max_tokens, efforts)
    slots = _SLOTS if options.batch_size is None else options.batch_size
    temperature = options.temperature or 0.0
    return Sweep.open(pair, options.weights, questions, limits, slots, options.reference, temperature)
