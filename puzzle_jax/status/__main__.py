"""`puzzle status RUN` (`python -m puzzle_jax.status RUN`): stages that are done, their seconds, and what comes next."""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "": Verb(
        name="status",
        summary="How far a run has come: stages that are done, their seconds, and what comes next.",
        settings="puzzle_jax.run.status:StatusSettings",
        run="puzzle_jax.run.status:run",
        shown=("price_per_gpu_hour", "json"),
        example="runs/mine",
        positional=("run",),
        computes=False,
    ),
}  # fmt: skip


main = partial(run_table, "status", VERBS)

if __name__ == "__main__":
    sys.exit(main())
