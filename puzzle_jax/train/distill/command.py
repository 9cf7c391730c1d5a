"""`puzzle train distill` and `puzzle train distill-blocks`."""

from __future__ import annotations

from puzzle_jax.consoles import plain_console
from puzzle_jax.processes.distributed import joined
from puzzle_jax.train.distill.recipe import DistillRecipe


def run(recipe: DistillRecipe, *, blocks: bool = False) -> None:
    """Trains a child, or resumes a run."""
    program = f"puzzle train distill{'-blocks' if blocks else ''}"
    processes = recipe.mesh.processes
    with joined(processes, recipe.mesh.devices // processes, program=program):
        from puzzle_jax.train.distill.run import distill

        distill(recipe, plain_console(stderr=True), blocks=blocks)


def run_blocks(recipe: DistillRecipe) -> None:
    """Trains every layer of a child on its own."""
    run(recipe, blocks=True)
