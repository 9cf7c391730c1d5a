"""`python -m puzzle_jax.train distill` and `distill-blocks`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from puzzle_jax.processes.distributed import joined
from puzzle_jax.settings.files import parse_settings, recipe_names
from puzzle_jax.train.distill.recipe import DistillRecipe


def parse_recipe(arguments: Sequence[str], prog: str) -> DistillRecipe:
    """The recipe that a command line asks for. Raises `ConfigError` for whatever is wrong with it."""
    _, recipe = parse_settings(
        arguments,
        DistillRecipe,
        prog=prog,
        description="Trains a child on its parent's own answers until it answers as well.",
        names=recipe_names("distill"),
    )
    return recipe


def run(arguments: Sequence[str], prog: str, console: Console, *, blocks: bool) -> None:
    """Trains a child, or goes on with a run that was begun."""
    recipe = parse_recipe(arguments, prog)
    processes = recipe.mesh.processes
    with joined(processes, recipe.mesh.devices // processes, program=prog):
        from puzzle_jax.train.distill.run import distill

        distill(recipe, console, blocks=blocks)
