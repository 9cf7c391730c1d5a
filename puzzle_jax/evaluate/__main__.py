"""`puzzle evaluate`, which is `python -m puzzle_jax.evaluate`: accuracy, speed, and the two together."""

from __future__ import annotations

import sys
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

VERBS = {
    "": Verb(
        name="evaluate",
        summary="Accuracy, tokens and speed of models side by side, per reasoning effort, and the frontier of both.",
        settings="puzzle_jax.evaluate.settings:Settings",
        run="puzzle_jax.evaluate.command:run",
        shown=(
            "models", "out", "tasks", "efforts", "problems", "max_tokens", "temperature", "throughput", "scenarios",
            "cache_memory",
        ),
        example="--models parent=DIR,child=DIR --tasks chain,my.jsonl --max-tokens low=32,high=128 --out compared",
        interrupted="answers are kept, and the same command goes on from them",
    ),
    "caches": Verb(
        name="evaluate caches",
        summary="What an FP8 key-value cache costs a model: bfloat16, calibrated and uncalibrated caches side by side.",
        settings="puzzle_jax.evaluate.caches:CachesSettings",
        run="puzzle_jax.evaluate.caches:run",
        shown=("model", "out", "tasks", "efforts", "problems", "max_tokens", "amplify", "seed"),
        example="--model DIR --out DIR --problems 200",
    ),
}  # fmt: skip


main = partial(run_table, "evaluate", VERBS)

if __name__ == "__main__":
    sys.exit(main())
