"""`python -m puzzle_jax.search [STAGE] [--recipe NAME|FILE] [--FIELD VALUE ...]`.

Without a stage, everything that is not up to date is run, and the table is printed. Some commands work without a run:
`solve --library FILE.json` solves any block library, `estimate` compares two architectures.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from puzzle_jax.cli import enable_compilation_cache, guarded
from puzzle_jax.errors import ConfigError

RECIPES = Path(__file__).parent.parent / "recipes"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the search; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if tool := _tool(arguments):
        return importlib.import_module(tool).main(arguments[1:])
    from jsonargparse import ArgumentError, ArgumentParser

    from puzzle_jax.search.pipeline import STAGES, Search
    from puzzle_jax.search.recipe import Recipe

    parser = ArgumentParser(
        prog="python -m puzzle_jax.search",
        description="From a trained parent to the child that serves a deployment best.",
        default_config_files=[str(RECIPES / "tiny.yaml")],
        exit_on_error=False,
    )
    parser.add_argument("stage", nargs="?", choices=("all", *STAGES), default="all", help="one stage, or all")
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", action="config", help=f"settings: a YAML file, or one of {names} (default: tiny)")
    parser.add_class_arguments(Recipe)

    def run() -> None:
        try:
            settings = parser.parse_args(with_recipe_files(arguments))
        except ArgumentError as error:
            raise ConfigError(" ".join(str(error).split())) from error
        stage = settings.pop("stage")
        settings.pop("recipe", None)
        settings.pop("__default_config__", None)
        enable_compilation_cache()
        search = Search(Recipe(**parser.instantiate(settings)))
        if stage == "all":
            search.execute_all()
        else:
            search.execute(stage)

    return guarded(parser.prog, run)


def recipe_names() -> list[str]:
    """Recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith("pretrain"))


def with_recipe_files(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a recipe given by name is the path of its file.

    Raises `ConfigError` for what is neither a file nor a name.
    """
    found = list(arguments)
    for index, argument in enumerate(found):
        if argument == "--recipe" and index + 1 < len(found):
            found[index + 1] = _recipe_file(found[index + 1])
        elif argument.startswith("--recipe="):
            found[index] = f"--recipe={_recipe_file(argument.partition('=')[2])}"
    return found


def _recipe_file(text: str) -> str:
    if text in recipe_names():
        return str(RECIPES / f"{text}.yaml")
    if not Path(text).exists():
        names = ", ".join(recipe_names())
        raise ConfigError(f"recipe is {text!r}, but there is no such file, and the names are {names}")
    return text


def _tool(arguments: Sequence[str]) -> str | None:
    """The module of a command that needs no run, if the arguments name one."""
    if arguments[:1] == ["solve"] and any(argument.split("=")[0] == "--library" for argument in arguments):
        return "puzzle_jax.search.solve_library"
    if arguments[:1] == ["estimate"]:
        return "puzzle_jax.search.estimate_command"
    return None


if __name__ == "__main__":
    sys.exit(main())
