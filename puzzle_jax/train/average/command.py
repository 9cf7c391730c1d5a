"""`puzzle train average`: averages the weights of two policies that were trained from one start.

`--weight` gives the weight to use. With `--weights` each of several averages answers problems first, a table shows
their accuracy and tokens, and the one that `average.sweep` chooses is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import MOST_TOGETHER, ConfigError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet
from puzzle_jax.evaluate.settings import Asked
from puzzle_jax.settings.fields import settings_of
from puzzle_jax.train.average.sweep import SPLIT, Sweep, run_sweep
from puzzle_jax.train.average.weights import Pair, check_out, write_average

_OF_SWEEP = ("problems", "tasks", "efforts", "max_tokens", "reference", "temperature", "seed", "batch_size")
"""Settings that only a sweep reads, and that are refused without one."""


@dataclass(frozen=True, kw_only=True)
class AverageSettings(Asked):
    """Settings of one average.

    Attributes:
      a: checkpoint of a policy.
      b: checkpoint of another policy from the same start.
      out: directory to write.
      weight: weight of B: 0 is A alone, 1 is B alone.
      weights: weights of B to try on problems, in place of weight; one is chosen.
      problems: number of problems of each task, each asked at every effort; needed with weights.
      reference: checkpoint whose mean tokens per answer are the limit; without one there is no limit.
      temperature: sampling temperature; 0 means greedy.
      batch_size: number of answers generated together.
    """

    a: Path
    b: Path
    out: Path
    weight: float | None = None
    weights: tuple[float, ...] = ()
    problems: int | None = None
    reference: Path | None = None
    temperature: float = 0.0
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.weight is None) == (not self.weights):
            given = "neither is" if self.weight is None else "both are"
            raise ConfigError(f"one of weight and weights must be given, but {given}")
        if self.weight is not None:
            check_range("weight", self.weight, 0, 1)
            defaults = {name: setting.default for name, setting in settings_of(AverageSettings).items()}
            for name in _OF_SWEEP:
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"{name} is given with weight, but only weights asks problems")
        elif self.problems is None:
            raise ConfigError("weights is given without problems, the number of problems of each task to ask")
        check_range("batch_size", self.batch_size, 1, MOST_TOGETHER)


def run(settings: AverageSettings, console: Console | None = None) -> None:
    """Averages with the given weight or the one that a sweep chooses, and prints the outcome.

    Raises PuzzleError for any unusable input, before weights are averaged and anything is written.
    """
    console = console or plain_console(stderr=True)
    pair = Pair.open(settings.a, settings.b)
    others = {"A": settings.a, "B": settings.b} | ({"reference": settings.reference} if settings.reference else {})
    check_out(settings.out, others)
    weight, sweep = settings.weight, _sweep(settings, pair) if settings.weights else None
    console.print(f"{len(pair.differing)} parameters differ, and are averaged", highlight=False)
    found = scales = None
    if sweep is not None:
        swept = run_sweep(pair, sweep, console)
        console.print(swept.table())
        weight, found, scales = swept.choice.weight, swept.record(), swept.scales
        console.print(f"weight {weight:g}: {swept.choice.why}", highlight=False)
    assert weight is not None
    write_average(pair, weight, settings.out, sweep=found, scales=scales)
    console.print(f"average with weight {weight:g}: {settings.out}", highlight=False, soft_wrap=True)


def _sweep(settings: AverageSettings, pair: Pair) -> Sweep:
    assert settings.problems is not None
    questions = QuestionSet(settings.tasks, settings.efforts, settings.problems, SPLIT, settings.seed)
    return Sweep.open(
        pair,
        settings.weights,
        questions,
        settings.max_tokens,
        settings.batch_size,
        settings.reference,
        settings.temperature,
    )
