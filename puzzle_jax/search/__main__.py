"""`puzzle search`, or `python -m puzzle_jax.search`: the search, and verbs that need no run directory.

`solve --library FILE.json` solves any block library; `solve` alone runs the stage of that name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from puzzle_jax.settings.verbs import Verb, run_table, run_verb

SEARCH = Verb(
    name="search",
    summary="From a trained parent to the child that serves a deployment best.",
    settings="puzzle_jax.search.command:SearchSettings",
    run="puzzle_jax.search.command:run",
    shown=(
        "parent", "run", "traces.tasks", "traces.max_tokens", "traces.file", "scenario.input_tokens",
        "scenario.output_tokens", "scenario.batch", "target.max_expert_bytes_ratio", "target.min_speedup",
        "space.windows", "costs",
    ),
    example="--parent DIR --traces.file answers.jsonl --target max_expert_bytes_ratio=0.75,min_speedup=1.3",
    recipes="search",
    positional=("stage",),
    base="puzzle_jax.search.recipe_file:starting_fields",
    interrupted="finished stages are kept",
)  # fmt: skip
ESTIMATE = Verb(
    name="search estimate",
    summary="How fast a model would serve, beside another, by arithmetic alone.",
    settings="puzzle_jax.costs.estimate_command:EstimateSettings",
    run="puzzle_jax.costs.estimate_command:run",
    shown=("model", "baseline", "scenario", "assumptions", "routing", "json", "list"),
    example="--model CHILD/config.json --baseline PARENT/config.json --scenario h100x8-64k",
    computes=False,
)
SOLVE = Verb(
    name="search solve",
    summary="The best choice from a block library, in a file, whoever measured it.",
    settings="puzzle_jax.program.command:LibrarySettings",
    run="puzzle_jax.program.command:run",
    shown=("library", "minimize", "at_most", "at_least", "sweep", "solutions", "time_limit", "gap", "json"),
    example="--library FILE.json --minimize metrics.kl_div --at-most stats.runtime_ms=17",
    computes=False,
)
VERBS = {"": SEARCH, "estimate": ESTIMATE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["solve"] and any(argument.partition("=")[0] == "--library" for argument in arguments):
        return run_verb(SOLVE, arguments[1:])
    return run_table("search", VERBS, arguments)


if __name__ == "__main__":
    sys.exit(main())
