"""`puzzle train VERB`, which is `python -m puzzle_jax.train VERB`."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

from puzzle_jax.settings.verbs import Verb, run_table

_KEPT = "the same command goes on from the last checkpoint"
_DISTILL = Verb(
    name="train distill",
    summary="Trains a child on its parent's own answers until it answers as well.",
    settings="puzzle_jax.train.distill.recipe:DistillRecipe",
    run="puzzle_jax.train.distill.command:run",
    shown=(
        "parent", "child", "traces", "out", "train", "data.row_length", "data.rows", "data.tasks",
        "optimizer.learning_rate", "loop.steps", "mesh.data", "mesh.model",
    ),
    example="--parent DIR --child DIR --traces answers.parquet --out DIR --loop steps=800 --mesh data=2,model=4",
    recipes="distill",
    interrupted=_KEPT,
)  # fmt: skip
VERBS = {
    "traces": Verb(
        name="train traces",
        summary="The parent answers problems, for its children to learn from.",
        settings="puzzle_jax.train.traces.command:AnswersSettings",
        run="puzzle_jax.train.traces.command:run",
        shown=("parent", "out", "problems", "tasks", "efforts", "max_tokens", "temperature", "batch_size", "seed"),
        example="--parent DIR --tasks my.jsonl,chain --problems 2000 --max-tokens 4096 --out answers.parquet",
    ),
    "distill": _DISTILL,
    "distill-blocks": replace(
        _DISTILL,
        name="train distill-blocks",
        summary="Trains every layer of a child alone on its parent's activations, a cheap start for distill.",
        run="puzzle_jax.train.distill.command:run_blocks",
    ),
    "grpo": Verb(
        name="train grpo",
        summary="A model learns from its own answers to problems whose answers can be checked.",
        settings="puzzle_jax.train.grpo.recipe:GrpoRecipe",
        run="puzzle_jax.train.grpo.command:run",
        shown=(
            "model", "out", "prompts.tasks", "prompts.efforts", "prompts.prompts", "rollout.group",
            "rollout.max_tokens", "reward.function", "loss.name", "optimizer.learning_rate", "loop.steps",
        ),
        example="--recipe grpo-accuracy --model DIR --out DIR --prompts.tasks my.jsonl=2,chain=1",
        recipes="grpo",
        interrupted=_KEPT,
    ),
    "average": Verb(
        name="train average",
        summary="The weights of two policies from one start become one model.",
        settings="puzzle_jax.train.average.command:AverageSettings",
        run="puzzle_jax.train.average.command:run",
        shown=("out", "weight", "weights", "problems", "tasks", "efforts", "max_tokens", "reference", "temperature"),
        example="DIR_A DIR_B --weights 0,0.25,0.5,0.75,1 --problems 200 --reference DIR --out DIR",
        positional=("a", "b"),
    ),
    "pretrain": Verb(
        name="train pretrain",
        summary="Trains a small parent from nothing on the embedded tasks.",
        settings="puzzle_jax.train.pretrain.recipe:PretrainRecipe",
        run="puzzle_jax.train.pretrain.run:run",
        shown=("out", "tasks", "efforts", "balance", "optimizer.learning_rate", "loop.steps", "seed"),
        example="--recipe pretrain-tiny --out DIR",
        recipes="pretrain",
        interrupted=_KEPT,
    ),
}  # fmt: skip


main = partial(run_table, "train", VERBS)

if __name__ == "__main__":
    sys.exit(main())
