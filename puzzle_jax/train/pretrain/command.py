"""`puzzle train pretrain --recipe FILE --out DIR`: a small parent from nothing."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.tasks import EFFORTS
from puzzle_jax.train.pretrain.recipe import PretrainRecipe
from puzzle_jax.train.pretrain.run import PARENT, REPORT, pretrain


def run(recipe: PretrainRecipe) -> None:
    """Trains, or goes on with a run that was begun, and shows what the parent can do."""
    console = plain_console(stderr=True)
    if not pretrain(recipe, console).preempted:
        console.print(_table(json.loads((recipe.out / PARENT / REPORT).read_text())))


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
