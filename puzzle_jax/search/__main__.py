"""`python -m puzzle_jax.search [STAGE] [--recipe NAME|FILE] [--FIELD VALUE ...]`.

Without a stage, everything that is not up to date is run, and the table is printed. Some commands work without a run:
`solve --library FILE.json` solves any block library, `estimate` compares two architectures, `plan` says what memory
every stage needs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from puzzle_jax.commands import enable_compilation_cache, guarded


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the search; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if tool := _tool(arguments):
        return importlib.import_module(tool).main(arguments[1:])
    from puzzle_jax.search.context import Search
    from puzzle_jax.search.parent import open_parent
    from puzzle_jax.search.pipeline import STAGE_NAMES, run_stages
    from puzzle_jax.search.recipe_file import parse_recipe
    from puzzle_jax.search.workers import Team, run_worker

    prog = "python -m puzzle_jax.search"

    def run() -> None:
        stage, recipe = parse_recipe(arguments, prog, STAGE_NAMES)
        enable_compilation_cache()
        with Team.join(recipe.mesh.processes, recipe.mesh.devices, program=prog) as team:
            if team.index:
                run_worker(team, open_parent(recipe))
            else:
                run_stages(Search(recipe, team=team), stage)

    return guarded(prog, run)


def _tool(arguments: Sequence[str]) -> str | None:
    """The module of a command that needs no run, if the arguments name one."""
    if arguments[:1] == ["solve"] and any(argument.split("=")[0] == "--library" for argument in arguments):
        return "puzzle_jax.program.command"
    if arguments[:1] == ["estimate"]:
        return "puzzle_jax.costs.estimate_command"
    if arguments[:1] == ["plan"]:
        return "puzzle_jax.plan.search_command"
    return None


if __name__ == "__main__":
    sys.exit(main())
