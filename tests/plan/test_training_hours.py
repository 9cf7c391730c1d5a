"""Hours of training: passes counted by hand, times the roofline's seconds of one pass."""

from dataclasses import replace
from pathlib import Path

import pytest

from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.child import identity_child
from puzzle_jax.plan.command import GrpoPlan
from puzzle_jax.plan.distill import PlannedDistillation
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.plan.training_hours import distillation_seconds, evaluations, policy_seconds
from puzzle_jax.search.hours.passes import ModelTime
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.distill.objectives import LossSettings
from puzzle_jax.train.distill.recipe import DataSettings, DistillRecipe
from puzzle_jax.train.grpo.prompts import PromptSettings
from puzzle_jax.train.grpo.recipe import GrpoRecipe, MonitoringSettings, RolloutSettings, UpdateSettings
from puzzle_jax.train.loop import LoopSettings
from tests.train.toy_student import CHILD, PARENT

H100 = HARDWARE["h100"]
NOWHERE = Path("-")
DISTILL = DistillRecipe(
    parent=NOWHERE,
    child=NOWHERE,
    traces=NOWHERE,
    out=NOWHERE,
    data=DataSettings(row_length=48, rows=4, micro_batches=3),
    loop=LoopSettings(steps=7),
    mesh=MeshSettings(data=2, sequence=2),
)
GRPO = GrpoRecipe(
    model=NOWHERE,
    out=NOWHERE,
    prompts=PromptSettings(tasks={"chain": 1.0, "sort": 2.0}, efforts={"low": 1.0, "high": 3.0}, prompts=6),
    rollout=RolloutSettings(group=5, max_tokens={"low": 16, "high": 32}, slots=10),
    update=UpdateSettings(row_length=64, rows=2),
    monitoring=MonitoringSettings(problems=9),
    loop=LoopSettings(steps=7, evaluate_every=3),
)


def test_a_distillation_is_the_students_passes_and_the_teachers():
    time = ModelTime(PARENT, "mxfp4", H100, data=4)
    student = replace(time, config=CHILD.config)
    found = distillation_seconds(PlannedDistillation(CHILD, DISTILL), H100)
    heads = time.heads(3 * 4 * 48)
    assert found == pytest.approx(
        {"student": 7 * (4 * student.forward(48, 12) + 4 * heads), "teacher": 7 * (time.forward(48, 12) + heads)}
    )
    kept = distillation_seconds(PlannedDistillation(CHILD, replace(DISTILL, remat=False)), H100)
    assert found["student"] - kept["student"] == pytest.approx(7 * student.forward(48, 12))
    alone = replace(DISTILL, loss=LossSettings(forward_kl=0.0, next_token=1.0))
    assert list(distillation_seconds(PlannedDistillation(CHILD, alone), H100)) == ["student"]


def test_reinforcement_learning_is_answers_scores_updates_and_evaluations():
    run = PlannedPolicy(identity_child(PARENT), GRPO)
    time = ModelTime(PARENT, "mxfp4", H100)
    found = policy_seconds(run, H100, prompt_tokens=12, answer_share=0.5)
    mean = (8 + 3 * 16) / 4
    rows = 30 * (12 + mean) / 64
    each = time.forward(64, rows)
    evaluated = sum(time.answering(12, length, 2 * 9, 10) for length in (8, 16))
    assert evaluations(GRPO) == 3  # after steps 3, 6 and 7
    assert found == pytest.approx(
        {
            "rollout": 7 * time.answering(12, mean, 30, 10),
            "log-probabilities": 7 * (each + time.heads(30 * mean)),  # of the reference
            "update": 7 * (4 * each + 4 * time.heads(64 * rows)),
            "evaluate": 3 * evaluated,
        }
    )
    twice = replace(GRPO, update=UpdateSettings(row_length=64, rows=2, updates=2))  # adds those before the first update
    scored = policy_seconds(PlannedPolicy(identity_child(PARENT), twice), H100, prompt_tokens=12, answer_share=0.5)
    assert scored["log-probabilities"] == pytest.approx(2 * found["log-probabilities"])
    assert evaluations(replace(GRPO, loop=LoopSettings(steps=7))) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0, but must be from 1 to 512"),
        ({"answer_share": 0.0}, "answer_share is 0.0, but must be above 0"),
        ({"price_per_gpu_hour": -1.0}, "price_per_gpu_hour is -1.0, but must be at least 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        GrpoPlan(model=NOWHERE, **settings)
