"""The embedded parent: its size and format, its recorded accuracies, and that its weights still reach them."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest

import puzzle_jax
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.network import to_compute
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import EFFORTS, TASKS, Chat
from puzzle_jax.train.__main__ import VERBS
from puzzle_jax.train.pretrain.measure import MAX_TOKENS

PACKAGE = Path(puzzle_jax.__file__).parent
PARENT = PACKAGE / "assets" / "tiny"


@pytest.fixture(scope="module")
def report():
    return json.loads((PARENT / "pretraining.json").read_text())


def test_it_is_small_and_in_the_format_of_gpt_oss():
    assert sum(path.stat().st_size for path in PARENT.iterdir()) <= 4 * 2**20
    config = json.loads((PARENT / "config.json").read_text())
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 3
    checkpoint = load_checkpoint(PARENT)
    assert checkpoint.config == parse(VERBS["pretrain"], ["--recipe", "pretrain-tiny", "--out", "nowhere"]).model
    assert isinstance(checkpoint.params["layers"][0]["moe"]["gate_up"], MXFP4)


def test_the_recipe_on_record_is_the_one_in_the_package(report):
    recipe = parse(VERBS["pretrain"], ["--recipe", "pretrain-tiny", "--out", "nowhere"])
    recorded = report["recipe"]
    assert recorded["seed"] == recipe.seed and recorded["steps"] == recipe.loop.steps
    assert recorded["tasks"] == recipe.tasks and recorded["efforts"] == recipe.efforts
    assert recorded["habits"] == vars(recipe.habits)
    assert [bucket["length"] for bucket in recorded["buckets"]] == [bucket.length for bucket in recipe.buckets]
    assert max(bucket.length for bucket in recipe.buckets) >= 400


def test_every_effort_leaves_room(report):
    means = [report["sampled"][effort]["mean"] for effort in EFFORTS]
    bands = [(0.25, 0.45), (0.50, 0.70), (0.75, 0.88)]
    for mean, (least, most) in zip(means, bands, strict=True):
        assert least <= mean["accuracy"] <= most
    assert means[0]["tokens"] < means[1]["tokens"] < means[2]["tokens"]


def test_failures_are_slips_rather_than_absences(report):
    levels = [levels for effort in ("medium", "high") for levels in report["by_level"][effort].values()]
    rates = [rate for of_task in levels for rate in of_task.values()]
    assert len(rates) == 2 * (10 + 6 + 5)
    assert sum(0.2 <= rate <= 0.95 for rate in rates) >= 0.7 * len(rates)
    assert report["greedy"]["high"]["mean"]["accuracy"] > report["sampled"]["high"]["mean"]["accuracy"]


def test_greedy_answers_leave_room_too(report):
    for effort, most in (("low", 0.6), ("medium", 0.75), ("high", 0.95)):
        assert report["greedy"][effort]["mean"]["accuracy"] <= most


def test_it_has_habits_that_could_be_left_out(report):
    low, medium, high = (report["sampled"][effort]["mean"] for effort in EFFORTS)
    assert low["checked"] == 0 and low["ended"] == 1
    assert 0.33 <= medium["checked"] <= 0.5 and 0.33 <= high["checked"] <= 0.5
    assert 0.94 <= high["ended"] <= 0.98 and medium["ended"] >= 0.99


def test_full_attention_is_used(report):
    far = report["recall_by_distance"]["high"]["beyond 64"]
    assert far["problems"] >= 20 and far["accuracy"] > 0.5


def test_experts_are_used_unevenly(report):
    used = report["effective_experts"]
    assert len(used) == 6 and all(10 <= count <= 14.5 for count in used)


def test_the_weights_keep_what_the_report_says(report):
    checkpoint = load_checkpoint(PARENT)
    chat = Chat.load(PARENT)
    answers = answer_questions(
        to_compute(checkpoint.params, jnp.float32),
        checkpoint.config,
        chat,
        QuestionSet(tuple(TASKS), ("high",), 16, "accuracy"),
        max_tokens=MAX_TOKENS,
        slots=16,
    )
    accuracy = sum(answer.correct for answer in answers) / len(answers)
    assert accuracy > report["greedy"]["high"]["mean"]["accuracy"] - 0.15
