"""`python -m puzzle_jax.train grpo`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from puzzle_jax.processes.distributed import joined
from puzzle_jax.settings.files import parse_settings, recipe_names
from puzzle_jax.train.grpo.recipe import GrpoRecipe


def parse_recipe(arguments: Sequence[str], prog: str) -> GrpoRecipe:
    """The recipe that a command line asks for. Raises `ConfigError` for whatever is wrong with it."""
    _, recipe = parse_settings(
        arguments,
        GrpoRecipe,
        prog=prog,
        description="A model learns from its own answers to problems whose answers can be checked.",
        names=recipe_names("grpo"),
    )
    return recipe


def run(arguments: Sequence[str], prog: str, console: Console) -> None:
    """Trains a policy, or goes on with a run that was begun."""
    recipe = parse_recipe(arguments, prog)
    processes = recipe.mesh.processes
    with joined(processes, recipe.mesh.devices // processes, program=prog):
        from puzzle_jax.train.grpo.run import grpo

        grpo(recipe, console)
