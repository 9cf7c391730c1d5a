"""Estimates how long training takes: the passes over the tokens of every step, in seconds by the roofline.

    distill    per step: the student's forward and backward pass, another forward pass where layers are rematerialised,
               and the teacher's forward pass where a loss needs it
    grpo       per step: answers of all groups, passes for old and reference log-probabilities, and the update; and the
               answers of every evaluation

A backward pass counts as two forward ones, since each product has two gradients. Rows are assumed to be full, answers
to be `answer_share` of their limits long, and prompts without signal not to be replaced. Left out: compiling, the
optimiser, the exchange of gradients between devices, and the computation of rewards.
"""

from __future__ import annotations

from puzzle_jax.config import ModelConfig
from puzzle_jax.costs.hardware import Hardware
from puzzle_jax.numeric import Number
from puzzle_jax.plan.distill import PlannedDistillation
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.search.hours.passes import ModelTime
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.grpo.recipe import GrpoRecipe

FORWARD_AND_BACK = 3


def distillation_seconds(run: PlannedDistillation, hardware: Hardware) -> dict[str, Number]:
    """Seconds of a whole distillation, by part."""
    recipe, (micro_batches, rows, length) = run.recipe, run.rows
    tokens = micro_batches * rows * length
    student, teacher = (_time(config, run.packed, hardware, recipe.mesh) for config in (run.child.config, run.parent))
    found = {"student": _learning(student, length, rows * micro_batches, recipe.remat)}
    if run.asks_teacher and recipe.teacher_cache is None:
        found["teacher"] = teacher.forward(length, micro_batches * rows) + teacher.heads(tokens)
    return {name: recipe.loop.steps * seconds for name, seconds in found.items()}


def policy_seconds(
    run: PlannedPolicy, hardware: Hardware, *, prompt_tokens: Number, answer_share: Number
) -> dict[str, Number]:
    """Seconds of a whole run of reinforcement learning, by part."""
    recipe = run.recipe
    time = _time(run.parent, run.packed, hardware, recipe.mesh)
    lengths = {effort: max(1.0, answer_share * recipe.rollout.limit(effort)) for effort in recipe.prompts.efforts}
    weights = recipe.prompts.efforts
    answers = recipe.prompts.prompts * recipe.rollout.group
    mean = sum(weight * lengths[effort] for effort, weight in weights.items()) / sum(weights.values())
    length = min(prompt_tokens + mean, recipe.update.row_length)
    rows = answers * length / recipe.update.row_length
    scored = time.forward(recipe.update.row_length, rows) + time.heads(answers * mean)
    learning = _learning(time, recipe.update.row_length, rows, recipe.remat)
    per_step = {
        "rollout": time.answering(prompt_tokens, mean, answers, recipe.rollout.slots),
        "log-probabilities": sum(run.scores.values()) * scored,
        "update": learning,
    }
    found = {name: recipe.loop.steps * seconds for name, seconds in per_step.items() if seconds}
    asked = len(recipe.prompts.task_weights) * recipe.monitoring.problems
    each = sum(time.answering(prompt_tokens, lengths[effort], asked, recipe.rollout.slots) for effort in weights)
    return {**found, "evaluate": evaluations(recipe) * each}


def evaluations(recipe: GrpoRecipe) -> int:
    """Number of evaluations in a run: one every `evaluate_every` steps, and one after the last step."""
    every, steps = recipe.loop.evaluate_every, recipe.loop.steps
    return -(-steps // every) if every else 1


def _time(config: ModelConfig, packed: bool, hardware: Hardware, mesh: MeshSettings) -> ModelTime:
    return ModelTime(config, "mxfp4" if packed else "bf16", hardware, mesh.data * mesh.sequence, mesh.model)


def _learning(time: ModelTime, length: int, rows: Number, remat: bool) -> Number:
    """Seconds of forward and backward passes of layers and head; logits are always recomputed in the backward pass."""
    layers = (FORWARD_AND_BACK + remat) * time.forward(length, rows)
    return layers + (FORWARD_AND_BACK + 1) * time.heads(rows * length)
