"""`puzzle train grpo`."""

from __future__ import annotations

from puzzle_jax.consoles import plain_console
from puzzle_jax.processes.distributed import joined
from puzzle_jax.train.grpo.recipe import GrpoRecipe


def run(recipe: GrpoRecipe) -> None:
    """Trains a policy, or resumes a run that was begun."""
    processes = recipe.mesh.processes
    with joined(processes, recipe.mesh.devices // processes, program="puzzle train grpo"):
        from puzzle_jax.train.grpo.run import grpo

        grpo(recipe, plain_console(stderr=True))
