"""Pretraining of a small parent on the embedded tasks: the loop from a recipe to a checkpoint directory.

Weights are trained in float32; in the final phase the experts pass through MXFP4 rounding in every forward pass, so
that packing them loses nothing. What is exported is then measured: accuracy and tokens per task and effort on
problems that training never saw, and recall by distance. A run saves its state now and then and goes on from it
when started again with the same recipe and output directory.

Left out: several devices, mixed precision, and anything that a parent of millions of parameters does not need.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.spec import Params, init_params
from puzzle_jax.tasks import PRETRAINING_TASKS, Chat
from puzzle_jax.tasks.chat.embedded import SPECIAL_TOKENS, chat_files, embedded_chat
from puzzle_jax.train.fake_quant import EXPERT_MATRICES, fake_quantize_experts, round_to_mxfp4
from puzzle_jax.train.pretrain.data import Batch, BatchSource, Mixture
from puzzle_jax.train.pretrain.loss import Metrics, pretraining_loss
from puzzle_jax.train.pretrain.measure import measure
from puzzle_jax.train.pretrain.recipe import PretrainRecipe

REPORT = "pretraining.json"
_AHEAD = 4  # batches made while the device works
_LOAD_STEPS = 100  # last steps whose expert load is reported


class State(NamedTuple):
    """What a resumed run needs beside the recipe."""

    step: int
    params: Params
    optimizer: Any


def initial_params(recipe: PretrainRecipe) -> Params:
    """Drawn weights, scaled so that a token's own embedding outweighs what untrained layers add to it."""
    params = init_params(recipe.model, jax.random.key(recipe.seed))
    params["embedding"] *= recipe.embedding_scale * recipe.model.hidden_size**0.5
    for layer in params["layers"]:
        layer["attention"]["o_weight"] *= recipe.residual_scale
        layer["moe"]["down"] *= recipe.residual_scale
    params["head"] *= 0.5
    return params


def make_optimizer(recipe: PretrainRecipe) -> optax.GradientTransformation:
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps),
            optax.linear_schedule(recipe.learning_rate, recipe.learning_rate / 20, recipe.final_steps),
        ],
        [recipe.steps - recipe.final_steps],
    )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, b2=recipe.adam_b2, weight_decay=recipe.weight_decay),
    )


def make_step(
    recipe: PretrainRecipe, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Params, Any, Metrics]]:
    """The jitted step: (params, optimizer state, batch, quantize=...) -> the same after one update, and metrics."""

    @partial(jax.jit, donate_argnums=(0, 1), static_argnames="quantize")
    def step(params: Params, state: Any, batch: Batch, *, quantize: bool) -> tuple[Params, Any, Metrics]:
        def loss(params: Params) -> tuple[Float[Array, ""], Metrics]:
            used = fake_quantize_experts(params) if quantize else params
            return pretraining_loss(used, recipe.model, batch, recipe.balance)

        gradients, metrics = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return cast(Params, optax.apply_updates(params, updates)), state, metrics

    return step


def round_for_export(params: Params) -> Params:
    """The float32 values that the checkpoint will hold: experts on MXFP4's grid, the rest on bfloat16's."""

    def rounded(path: tuple[Any, ...], leaf: Array) -> Array:
        if path[-1].key in EXPERT_MATRICES:
            return round_to_mxfp4(leaf)
        return leaf.astype(jnp.bfloat16).astype(jnp.float32)

    return jax.tree_util.tree_map_with_path(rounded, params)


def pretrain(
    recipe: PretrainRecipe,
    out: Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    on_stage: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Trains, measures and writes a parent; returns the report that it also writes.

    Args:
      recipe: every setting.
      out: directory to make; the resumable state lies beside it in `<out>.state` until the run is done.
      on_step: called after each step with its number (from 1) and next-token loss.
      on_stage: called with a line of text when the run goes over to something else.

    Raises:
      PuzzleError: `out` holds something already, or the state beside it belongs to another recipe.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PuzzleError(f"{out} exists and is not empty; choose another directory or empty it")
    optimizer = make_optimizer(recipe)
    params = initial_params(recipe)
    state = State(0, params, optimizer.init(params))
    saved = out.with_name(out.name + ".state")
    state = load_state(saved, recipe, state)
    if state.step:
        on_stage(f"going on from step {state.step}")
    began = time.monotonic()
    state, load = _train(recipe, state, optimizer, saved, on_step)
    minutes = (time.monotonic() - began) / 60
    on_stage("measuring on held-out problems")
    params = round_for_export(state.params)
    chat = embedded_chat()
    report = {
        "recipe": dataclasses.asdict(recipe),
        "seed": recipe.seed,
        "versions": {"jax": jax.__version__, "numpy": np.__version__, "optax": optax.__version__},
        "training_minutes": round(minutes, 1),
        "effective_experts": [round(float(x), 2) for x in effective_experts(load)],
        **measure(params, recipe.model, chat, tuple(recipe.tasks), recipe.held_out),
    }
    save_checkpoint(
        out,
        recipe.model,
        params,
        config_base=_token_ids(chat),
        extra_files={**chat_files(), REPORT: (json.dumps(report, indent=2) + "\n").encode()},
    )
    saved.with_suffix(saved.suffix + ".npz").unlink(missing_ok=True)
    return report


def _token_ids(chat: Chat) -> dict[str, Any]:
    names = {"eos_token_id": "<|return|>", "pad_token_id": SPECIAL_TOKENS[0]}
    return {name: chat.tokenizer.token_to_id(token) for name, token in names.items()}


def _train(
    recipe: PretrainRecipe,
    state: State,
    optimizer: optax.GradientTransformation,
    saved: Path,
    on_step: Callable[[int, float], None],
) -> tuple[State, Float[np.ndarray, "layers experts"]]:
    """Runs the remaining steps; also the mean load of the last ones."""
    mixture = Mixture(
        tuple((PRETRAINING_TASKS[name], weight) for name, weight in recipe.tasks.items()), tuple(recipe.efforts.items())
    )
    chat = embedded_chat()
    source = BatchSource(chat, mixture, recipe.buckets, recipe.seed, recipe.steps)
    step = make_step(recipe, optimizer)
    number, params, opt_state = state
    loads: list[np.ndarray] = []
    for batch in _prefetched(source, number):
        quantize = number >= recipe.steps - recipe.final_steps
        params, opt_state, metrics = step(params, opt_state, batch, quantize=quantize)
        number += 1
        loss = float(metrics.next_token)
        if not np.isfinite(loss):
            raise PuzzleError(f"the loss is {loss} at step {number}; a lower learning_rate would help")
        loads = [*loads[1 - _LOAD_STEPS :], np.asarray(metrics.load)]
        on_step(number, loss)
        if number % recipe.save_every == 0 or number == recipe.steps:
            save_state(saved, recipe, State(number, params, opt_state))
    if not loads:  # resumed after its last step
        loads = [np.full((recipe.model.num_layers, recipe.model.blocks[0].num_experts), np.nan)]
    return State(number, params, opt_state), np.mean(loads, axis=0)


def _prefetched(source: BatchSource, first: int) -> Iterator[Batch]:
    """Batches of the steps from `first` on, made a few ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(source.batch, i) for i in range(first, min(first + _AHEAD, source.steps))]
        for step in range(first, source.steps):
            if step + _AHEAD < source.steps:
                pending.append(pool.submit(source.batch, step + _AHEAD))
            yield pending.pop(0).result()


def effective_experts(load: Float[np.ndarray, "layers experts"]) -> Float[np.ndarray, "layers"]:
    """exp of the load's entropy: how many experts would carry it if they carried it evenly."""
    share = load / load.sum(axis=-1, keepdims=True)
    return np.exp(-np.sum(share * np.log(np.maximum(share, 1e-30)), axis=-1))


def _state_file(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".npz")


def save_state(path: Path, recipe: PretrainRecipe, state: State) -> None:
    """Writes the state beside its place and renames it, so that no half file is left."""
    leaves = jax.tree.leaves((state.params, state.optimizer))
    arrays = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)}
    file = _state_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_name(f".{file.name}.{os.getpid()}")
    with open(partial_file, "wb") as stream:
        np.savez(stream, allow_pickle=False, step=state.step, recipe=_fingerprint(recipe), **arrays)
    partial_file.replace(file)


def load_state(path: Path, recipe: PretrainRecipe, fresh: State) -> State:
    """The saved state, or `fresh` when there is none; raises PuzzleError for another recipe's state."""
    file = _state_file(path)
    if not file.is_file():
        return fresh
    with np.load(file) as saved:
        if str(saved["recipe"]) != _fingerprint(recipe):
            raise PuzzleError(f"{file} holds the state of another recipe; remove it or choose another directory")
        _, structure = jax.tree.flatten((fresh.params, fresh.optimizer))
        leaves = [jnp.asarray(saved[f"leaf_{i}"]) for i in range(structure.num_leaves)]
        params, optimizer = jax.tree.unflatten(structure, leaves)
        return State(int(saved["step"]), params, optimizer)


def _fingerprint(recipe: PretrainRecipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), sort_keys=True)
