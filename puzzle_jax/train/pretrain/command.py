"""`puzzle train pretrain --recipe FILE --out DIR`: a small parent from nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.tasks import EFFORTS
from puzzle_jax.train.pretrain.recipe import PretrainRecipe
from puzzle_jax.train.pretrain.run import pretrain

_LINE_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(PretrainRecipe):
    """One run of pretraining.

    Attributes:
      out: checkpoint directory to make.
    """

    out: Path


def run(settings: PretrainSettings) -> None:
    """Trains, and shows what the parent can do."""
    console = plain_console(stderr=True)
    recipe = PretrainRecipe(**{of.name: getattr(settings, of.name) for of in fields(PretrainRecipe)})
    console.print(_table(_run(recipe, settings.out, console)))
    console.print(f"checkpoint: {settings.out}", highlight=False, soft_wrap=True)


def _run(recipe: PretrainRecipe, out: Path, console: Console) -> dict[str, Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("pretrain", total=recipe.steps, loss=float("nan"))
        line = _plain_lines(console, recipe.steps)

        def on_step(step: int, loss: float) -> None:
            progress.update(bar, completed=step, loss=loss)
            if not console.is_terminal:
                line(step, loss)

        return pretrain(recipe, out, on_step=on_step, on_stage=console.print)


def _plain_lines(console: Console, steps: int) -> Callable[[int, float], None]:
    """Prints a line now and then, for output that is no terminal."""
    began = last = time.monotonic()
    first: int | None = None
    losses: list[float] = []

    def line(step: int, loss: float) -> None:
        nonlocal last, first
        first = step - 1 if first is None else first
        losses.append(loss)
        now = time.monotonic()
        if now - last < _LINE_SECONDS and step < steps:
            return
        left = (now - began) / (step - first) * (steps - step)
        mean = sum(losses) / len(losses)
        console.print(f"step {step}/{steps}  loss {mean:.3f}  {left / 60:.1f} minutes left", highlight=False)
        losses.clear()
        last = now

    return line


def _table(report: dict[str, Any]) -> Table:
    table = Table("task", *(f"{effort}: greedy / sampled (tokens)" for effort in EFFORTS))
    for task in report["sampled"][EFFORTS[0]]:
        cells = []
        for effort in EFFORTS:
            greedy, sampled = report["greedy"][effort][task], report["sampled"][effort][task]
            cells.append(f"{greedy['accuracy']:.2f} / {sampled['accuracy']:.2f} ({sampled['tokens']:.0f})")
        table.add_row(task, *cells)
    for label in report.get("recall_by_distance", {}).get(EFFORTS[0], {}):
        accuracies = (report["recall_by_distance"][effort][label]["accuracy"] for effort in EFFORTS)
        table.add_row(f"recall {label}", *(f"{accuracy:.2f}" for accuracy in accuracies))
    return table
