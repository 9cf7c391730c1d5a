"""Command line of training: `python -m puzzle_jax.train VERB ...`.

traces          the parent answers problems to learn from
distill         a child learns from its parent on such answers
distill-blocks  every layer of a child learns alone, a cheap start for distill
grpo            a model learns from its own answers to problems whose answers can be checked
average         the weights of two such models become one model
plan            what a distillation needs on every device, before there are devices
plan-grpo       what grpo needs, likewise
pretrain        a small parent from nothing
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from puzzle_jax.commands import Parser, enable_compilation_cache, guarded
from puzzle_jax.consoles import plain_console

PROGRAM = "python -m puzzle_jax.train"
RECIPE_VERBS = {"distill": False, "distill-blocks": True}
"""Verbs whose options are a recipe's fields, and whether blocks are trained alone."""

GRPO = "grpo"
VERBS = {
    "traces": "the parent answers problems to learn from",
    "average": "the weights of two policies from one start become one model",
    "plan": "what a distillation needs on every device, before there are devices",
    "plan-grpo": "what reinforcement learning needs on every device, before there are devices",
    "pretrain": "train a small parent on the embedded tasks",
}
"""Verbs with options of their own, in a module `VERB_command`, with "_" for "-"."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code (2 for what the user can mend)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = plain_console(stderr=True)
    verb = arguments[0] if arguments else None
    prog = PROGRAM if verb is None else f"{PROGRAM} {verb}"
    kept = "the same command goes on from the last checkpoint"
    if verb == GRPO:
        grpo = importlib.import_module("puzzle_jax.train.grpo.command")
        return guarded(prog, lambda: _cached(grpo, arguments[1:], prog, console), interrupted=kept)
    if verb in RECIPE_VERBS:
        distill = importlib.import_module("puzzle_jax.train.distill.command")
        blocks = RECIPE_VERBS[verb]
        return guarded(prog, lambda: _cached(distill, arguments[1:], prog, console, blocks=blocks), interrupted=kept)
    parser = Parser(prog=PROGRAM, description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, what in VERBS.items():
        _command(name).add_arguments(verbs.add_parser(name, help=what))
    for name in (*RECIPE_VERBS, GRPO):
        verbs.add_parser(name, help=f"see {PROGRAM} {name} --help")

    def run() -> None:
        options = parser.parse_args(arguments)
        _cached(_command(options.verb), options, console)

    return guarded(prog, run, interrupted=kept)


def _cached(command: Any, *arguments: Any, **options: Any) -> None:
    """Runs a command, with the cache of compiled programs."""
    enable_compilation_cache()
    command.run(*arguments, **options)


def _command(verb: str) -> Any:
    """The module of a verb."""
    return importlib.import_module(f"puzzle_jax.train.{verb.replace('-', '_')}_command")


if __name__ == "__main__":
    raise SystemExit(main())
