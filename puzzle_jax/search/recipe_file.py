"""Recipes of searches, from files, names and the command line."""

from __future__ import annotations

from collections.abc import Sequence

from puzzle_jax.recipe_files import parse_settings, recipe_names
from puzzle_jax.search.recipe import Recipe


def parse_recipe(arguments: Sequence[str], prog: str, stages: Sequence[str] = ()) -> tuple[str, Recipe]:
    """A stage ("all" by default) and the recipe that a command line asks for; without a recipe it is the tiny one.

    Raises `ConfigError` for whatever is wrong with either. `--help` and `--print_config` print and exit.
    """
    stage, recipe = parse_settings(
        arguments,
        Recipe,
        prog=prog,
        description="From a trained parent to the child that serves a deployment best.",
        names=recipe_names("search"),
        default="tiny",
        choice=("stage", ("all", *stages), "one stage, or all"),
    )
    assert stage is not None
    return stage, recipe
