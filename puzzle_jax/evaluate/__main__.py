"""`python -m puzzle_jax.evaluate --models parent=DIR child=DIR --out DIR`: accuracy, speed, and the two together.

The first model is the reference that every other is compared with. Answers are kept as they come: after an interrupt
the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.commands import Parser, enable_compilation_cache, guarded
from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.settings import MAX_TOKENS, Scenario, Settings, SpeedSettings, limits_by_effort
from puzzle_jax.tasks import EFFORTS, TASKS

_TABLE_WIDTH = 150  # about what the tables need
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_LIMITS = ",".join(f"{effort}={limit}" for effort, limit in MAX_TOKENS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the evaluation; returns the exit code."""

    def run() -> None:
        from rich.text import Text

        from puzzle_jax.consoles import plain_console
        from puzzle_jax.evaluate.run import Evaluation
        from puzzle_jax.files import write_beside
        from puzzle_jax.report.evaluation import EvaluationReport
        from puzzle_jax.report.figures import frontier_figure

        settings = parse(arguments)
        enable_compilation_cache()
        console = plain_console(width=_TABLE_WIDTH)
        evaluation = Evaluation(settings, console).run()
        report = EvaluationReport(evaluation)
        write_beside(settings.out / "report.md", report.markdown().encode())
        if evaluation["points"]:
            write_beside(settings.out / "frontier.png", frontier_figure(evaluation["points"], evaluation["reference"]))
        report.show(console)
        where = Text.assemble("Everything is in ", (str(settings.out), "bold"))
        console.print(where, highlight=False, soft_wrap=True)

    return guarded(
        "python -m puzzle_jax.evaluate", run, interrupted="answers are kept, and the same command goes on from them"
    )


def parse(arguments: Sequence[str] | None) -> Settings:
    """Settings of a command line; raises ConfigError for what it cannot mean."""
    options = _parser().parse_args(arguments)
    speed = None
    if options.throughput:
        speed = SpeedSettings(
            scenarios=tuple(_scenario(part) for part in _parts(options.scenarios)),
            cache_memory=_bytes(options.cache_memory),
            max_batch=options.max_batch,
            rounds=options.rounds,
        )
    return Settings(
        models=_models(options.models),
        out=options.out,
        tasks=_parts(options.tasks),
        efforts=_parts(options.efforts),
        problems=options.problems,
        seed=options.seed,
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens={**MAX_TOKENS, **limits_by_effort(options.max_tokens)},
        slots=options.slots,
        cache_dtype=options.cache_dtype,
        bootstrap=options.bootstrap,
        speed=speed,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m puzzle_jax.evaluate",
        description="Accuracy, tokens and speed of models side by side.",
    )

    def add(flag: str, *, help: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(flag, help=help + shown, **options)

    add("--models", nargs="+", required=True, metavar="NAME=DIR", help="checkpoints; the first is the reference")
    add("--out", type=Path, required=True, metavar="DIR", help="where everything is written, and resumed from")
    add("--tasks", default=",".join(TASKS), help="names with commas between")
    add("--efforts", default=",".join(EFFORTS), help="reasoning efforts")
    add("--problems", type=int, default=500, help="per effort and model, split evenly over the tasks")
    add("--seed", type=int, default=0, help="draws other problems and other answers")
    add("--temperature", type=float, default=1.0, help="of sampling; 0 is greedy")
    add("--top-p", type=float, default=1.0, help="share of the probability that is sampled from")
    add(
        "--max-tokens",
        default=_LIMITS,
        metavar="EFFORT=N,...",
        help="limit of an answer; the defaults suit the embedded parent",
    )
    add("--slots", type=int, default=64, help="answers generated together")
    add("--cache-dtype", default="compute", help="of keys and values: compute, float32, bfloat16 or float8_e4m3fn")
    add("--bootstrap", type=int, default=2000, help="draws behind every interval of a comparison")
    add("--no-throughput", dest="throughput", action="store_false", help="measure no speed, and draw no frontier")
    add(
        "--scenarios",
        default="chat=160:128",
        metavar="NAME=INPUT:OUTPUT,...",
        help="lengths to measure, such as short=64:32,long=256:64",
    )
    add("--cache-memory", default="16MiB", help="bytes (or KiB, MiB, GiB) for the caches of what runs together")
    add("--max-batch", type=int, default=32, help="requests that run together at most, however small their caches")
    add("--rounds", type=int, default=5, help="counted rounds of every measurement")
    return parser


def _models(texts: Sequence[str]) -> dict[str, Path]:
    models: dict[str, Path] = {}
    for text in texts:
        name, equals, directory = text.partition("=")
        if not (name and equals and directory):
            raise ConfigError(f"--models has {text!r}, but must be of the form NAME=DIRECTORY")
        if name in models:
            raise ConfigError(f"--models names {name!r} twice, but every model needs a name of its own")
        models[name] = Path(directory)
    return models


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _scenario(text: str) -> Scenario:
    found = re.fullmatch(r"([^=]+)=(\d+):(\d+)", text)
    if not found:
        raise ConfigError(f"--scenarios has {text!r}, but must be of the form NAME=INPUT:OUTPUT in tokens")
    return Scenario(found[1], int(found[2]), int(found[3]))


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]iB|)", text)
    if not found:
        raise ConfigError(f"--cache-memory is {text!r}, but must be bytes or a number with KiB, MiB or GiB")
    return int(found[1]) * _UNITS[found[2]]


if __name__ == "__main__":
    sys.exit(main())
