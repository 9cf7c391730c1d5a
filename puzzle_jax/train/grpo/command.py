"""`puzzle train grpo`."""

from __future__ import annotations

import jax
from rich.console import Console

from puzzle_jax.consoles import plain_console
from puzzle_jax.processes.distributed import joined
from puzzle_jax.train.grpo.recipe import GrpoRecipe


def run(recipe: GrpoRecipe) -> None:
    """Trains a policy, or goes on with a run that was begun."""
    processes = recipe.mesh.processes
    with joined(processes, recipe.mesh.devices // processes, program="puzzle train grpo"):
        _run(recipe, plain_console(stderr=True))


def _run(recipe: GrpoRecipe, console: Console) -> None:
    from puzzle_jax.report.training import write_training_report
    from puzzle_jax.train.grpo.run import RewardCollapse, grpo
    from puzzle_jax.train.metrics import METRICS_FILE

    def report() -> None:
        if jax.process_index():
            return  # the primary process reports for all
        if (recipe.out / METRICS_FILE).stat().st_size:  # a signal may come before the first line
            console.print(f"report: {write_training_report(recipe.out)}", highlight=False)

    try:
        grpo(recipe, console)
    except RewardCollapse:
        report()
        raise
    report()
