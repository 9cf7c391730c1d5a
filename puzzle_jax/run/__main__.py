"""`puzzle run`, which is `python -m puzzle_jax.run`: from a parent to a better child in one command."""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "": Verb(
        name="run",
        summary="From a parent to a trained, evaluated and exported child: all stages, each resumed or skipped.",
        settings="puzzle_jax.run.settings:RunSettings",
        run="puzzle_jax.run.command:run",
        shown=(
            "parent", "tasks", "scenario", "run", "efforts", "max_tokens", "mesh.data", "mesh.model",
            "search.target.min_speedup", "stage", "dry_run", "price_per_gpu_hour",
        ),
        example="--parent DIR --tasks my.jsonl --scenario h100x8-64k --run runs/mine",
        recipes="run",
        base="puzzle_jax.run.derived:starting_fields",
        interrupted="finished stages and checkpoints are kept, and the same command goes on",
    ),
}  # fmt: skip


main = partial(run_table, "run", VERBS)

if __name__ == "__main__":
    sys.exit(main())
