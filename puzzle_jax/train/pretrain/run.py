"""Pretraining of a small parent on the embedded tasks: from a recipe to a checkpoint directory.

    OUT/run.json, checkpoints/, metrics.jsonl, report.html   the run (`train.loop`)
    OUT/parent/                                              the parent, with pretraining.json: what it can do

Weights are trained in float32; while the learning rate falls at the end, experts that will be exported as MXFP4 pass
through its rounding in every forward pass, so that packing them loses nothing. What is exported is then measured:
accuracy and tokens per task and effort on problems that training never saw, and recall by distance.

Left out: several devices, mixed precision, and anything that a parent of millions of parameters does not need.
"""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from rich.console import Console

from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.files import read_object
from puzzle_jax.model.spec import Params, init_params
from puzzle_jax.runs import METRICS_FILE, open_run, read_metrics
from puzzle_jax.tasks import Chat, worked_task
from puzzle_jax.tasks.chat.embedded import chat_files, embedded_chat, token_ids
from puzzle_jax.train.fake_quant import is_expert_matrix, round_to_mxfp4
from puzzle_jax.train.loop import Job, Trained, train
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.pretrain.data import BatchSource
from puzzle_jax.train.pretrain.loss import EFFECTIVE_EXPERTS, pretraining_loss
from puzzle_jax.train.pretrain.measure import measure, table
from puzzle_jax.train.pretrain.recipe import PretrainRecipe
from puzzle_jax.train.run import report
from puzzle_jax.train.step import init_state, make_step

PARENT, REPORT = "parent", "pretraining.json"
_LOAD_STEPS = 100  # last steps whose expert load is reported


def run(recipe: PretrainRecipe) -> None:
    """`puzzle train pretrain`: trains, or resumes a run, and shows what the parent can do."""
    console = plain_console(stderr=True)
    if not pretrain(recipe, console).preempted:
        console.print(table(read_object(recipe.out / PARENT / REPORT)))


def pretrain(recipe: PretrainRecipe, console: Console) -> Trained:
    """Trains, measures and writes a parent; on a signal it saves and returns early, without a parent.

    Raises PuzzleError where `recipe.out` holds something else.
    """
    open_run(recipe.out, recipe.identity)
    chat = embedded_chat(recipe.model.variant.family)
    trained = train(pretraining_job(recipe, chat), recipe.loop, recipe.out, console)
    if not trained.preempted and not (recipe.out / PARENT).exists():
        export(recipe, trained.state.params, chat, console)
    report(recipe.out, console)
    return trained


def pretraining_job(recipe: PretrainRecipe, chat: Chat) -> Job:
    """The job that the training loop runs."""
    optimizer = make_optimizer(recipe.optimizer, recipe.loop.steps)
    tasks = [(worked_task(name), weight) for name, weight in recipe.tasks.items()]
    efforts = list(recipe.efforts.items())
    return Job(
        initial=lambda: init_state(initial_params(recipe), optimizer, jax.random.key(recipe.seed)),
        step=make_step(partial(pretraining_loss, recipe.model, recipe.balance), optimizer),
        fixed=None,
        batches=BatchSource(
            chat,
            tasks,
            efforts,
            recipe.buckets,
            recipe.seed,
            recipe.loop.steps,
            recipe.habits,
            recipe.rounded_steps,
        ),
        identity=recipe.identity,
        name="pretraining",
    )


def initial_params(recipe: PretrainRecipe) -> Params:
    """Random weights, scaled so that a token's own embedding outweighs what untrained layers add to it."""
    params = init_params(recipe.model, jax.random.key(recipe.seed))
    params["embedding"] *= recipe.embedding_scale * recipe.model.hidden_size**0.5
    for layer in params["layers"]:
        layer["attention"]["o_weight"] *= recipe.residual_scale
        layer["moe"]["down"] *= recipe.residual_scale
    if "head" in params:
        params["head"] *= 0.5
    return params


def export(recipe: PretrainRecipe, params: Params, chat: Chat, console: Console) -> None:
    """Measures the parent as its checkpoint will hold it, and writes both."""
    console.print("measuring on held-out problems", highlight=False)
    params = round_for_export(params, packed=recipe.form == "mxfp4")
    lines = [line for line in read_metrics(recipe.out / METRICS_FILE) if line["step"] > recipe.loop.steps - _LOAD_STEPS]
    found = {
        "recipe": recipe.identity["recipe"],
        "seed": recipe.seed,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "optax": optax.__version__},
        "effective_experts": [
            round(float(np.mean([line[f"{EFFECTIVE_EXPERTS}{layer}"] for line in lines])), 2)
            for layer in range(recipe.model.num_layers)
        ],
        **measure(params, recipe.model, chat, tuple(recipe.tasks), recipe.held_out, max_tokens=recipe.max_tokens),
    }
    family = recipe.model.variant.family
    save_checkpoint(
        recipe.out / PARENT,
        recipe.model,
        params,
        config_base=token_ids(family),
        extra_files={**chat_files(family), REPORT: (json.dumps(found, indent=2) + "\n").encode()},
        form=recipe.form,
    )
    console.print(f"parent: {recipe.out / PARENT}", highlight=False)


def round_for_export(params: Params, packed: bool = True) -> Params:
    """The float32 values that the checkpoint will hold: experts on MXFP4's grid if they are packed, the rest on
    bfloat16's."""

    def rounded(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        packs = packed and is_expert_matrix(path)
        return round_to_mxfp4(leaf) if packs else leaf.astype(jnp.bfloat16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(rounded, params)
