"""`puzzle plan search|distill|grpo`, which is `python -m puzzle_jax.plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from puzzle_jax.settings.verbs import Verb, run_table

_DEVICES = ("mesh.data", "mesh.model", "hbm_gb", "hardware", "compiler", "json")
VERBS = {
    "search": Verb(
        name="plan search",
        summary="What a search needs on every device, from config.json and settings alone.",
        settings="puzzle_jax.plan.command:SearchPlan",
        run="puzzle_jax.plan.command:plan_search",
        shown=("parent", "traces.max_tokens", "traces.batch_size", "prompt_tokens", "score.per_call", *_DEVICES),
        example="--parent DIR --recipe gpt-oss-20b-1xh100 --mesh model=4 --hardware h100",
        recipes="search",
        base="puzzle_jax.search.recipe_file:without_deployment",
    ),
    "distill": Verb(
        name="plan distill",
        summary="What a distillation needs on every device, from config.json and settings alone.",
        settings="puzzle_jax.plan.command:DistillPlan",
        run="puzzle_jax.plan.command:plan_distill",
        shown=("parent", "child", "data.row_length", "data.rows", "data.micro_batches", "mesh.sequence", *_DEVICES),
        example="--parent DIR --child DIR --data row_length=4096,rows=8 --mesh data=4,model=2",
        recipes="distill",
    ),
    "grpo": Verb(
        name="plan grpo",
        summary="What reinforcement learning needs on every device, from config.json and settings alone.",
        settings="puzzle_jax.plan.command:GrpoPlan",
        run="puzzle_jax.plan.command:plan_grpo",
        shown=("model", "rollout.slots", "rollout.max_tokens", "update.row_length", "update.rows", *_DEVICES),
        example="--model DIR --recipe grpo-gpt-oss-puzzle-88b --mesh data=2,sequence=4,model=8",
        recipes="grpo",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb; returns the exit code."""
    return run_table("plan", VERBS, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
