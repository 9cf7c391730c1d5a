"""`python -m puzzle_jax.search [STAGE] [--recipe FILE] [--FIELD VALUE ...]`.

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
    from puzzle_jax.search.recipe_file import check_file, check_sections, recipe_paths

    parser = ArgumentParser(
        prog="python -m puzzle_jax.search",
        description="From a trained parent to the child that serves a deployment best.",
        default_config_files=[str(RECIPES / "tiny.yaml")],
        exit_on_error=False,
    )
    parser.add_argument("stage", nargs="?", choices=("all", *STAGES), default="all", help="one stage, or all")
    parser.add_argument("--recipe", action="config", help="a YAML file of settings (default: tiny)")
    parser.add_class_arguments(Recipe)

    def run() -> None:
        for path in recipe_paths(arguments):
            check_file(path)
        try:
            settings = parser.parse_args(arguments)
        except ArgumentError as error:
            raise ConfigError(" ".join(str(error).split())) from error
        stage = settings.pop("stage")
        settings.pop("recipe", None)
        settings.pop("__default_config__", None)
        check_sections(settings.as_dict(), Recipe)
        enable_compilation_cache()
        search = Search(Recipe(**parser.instantiate(settings)))
        if stage == "all":
            search.execute_all()
        else:
            search.execute(stage)

    return guarded(parser.prog, run)


def _tool(arguments: Sequence[str]) -> str | None:
    """The module of a command that needs no run, if the arguments name one."""
    if arguments[:1] == ["solve"] and any(argument.split("=")[0] == "--library" for argument in arguments):
        return "puzzle_jax.search.solve_library"
    if arguments[:1] == ["estimate"]:
        return "puzzle_jax.search.estimate_command"
    return None


if __name__ == "__main__":
    sys.exit(main())
