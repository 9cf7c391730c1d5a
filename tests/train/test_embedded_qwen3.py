"""The second embedded parent, in Qwen3-MoE's shape: its size, and that its weights reach the recorded accuracies."""

import json

import jax.numpy as jnp
import pytest

from puzzle_jax.config import QWEN3_MOE
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.model.network import to_compute
from puzzle_jax.settings.files import ASSETS
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import EFFORTS, Chat
from puzzle_jax.train.__main__ import VERBS

PARENT = ASSETS / "tiny-qwen3"
RECIPE = parse(VERBS["pretrain"], ["--recipe", "pretrain-tiny-qwen3", "--out", "nowhere"])


@pytest.fixture(scope="module")
def report():
    return json.loads((PARENT / "pretraining.json").read_text())


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(PARENT)


def test_it_is_small_and_in_the_format_of_qwen3_moe(checkpoint):
    assert (PARENT / "model.safetensors").stat().st_size <= 8 * 10**6
    config = json.loads((PARENT / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["torch_dtype"] == "bfloat16"
    assert (config["num_experts"], config["num_experts_per_tok"], config["num_hidden_layers"]) == (32, 4, 8)
    assert checkpoint.config == RECIPE.model and checkpoint.config.variant == QWEN3_MOE
    assert Chat.load(PARENT).format.name == "ChatML"


def test_the_recipe_on_record_is_the_one_in_the_package(report):
    recorded, own = report["recipe"], RECIPE.identity["recipe"]
    assert recorded == json.loads(json.dumps(own))
    assert sum(task.startswith("reasoning-gym:") for task in recorded["tasks"]) == 2


def test_efforts_differ_and_leave_room(report):
    low, medium, high = (report["sampled"][effort]["mean"] for effort in EFFORTS)
    assert low["tokens"] < medium["tokens"] < high["tokens"]
    assert low["accuracy"] < medium["accuracy"] < high["accuracy"] < 0.95


def test_experts_are_used_unevenly(report):
    used = report["effective_experts"]
    assert len(used) == 8 and all(8 <= count <= 30 for count in used)


def test_the_weights_keep_what_the_report_says(report, checkpoint):
    answers = answer_questions(
        to_compute(checkpoint.params, jnp.float32),
        checkpoint.config,
        Chat.load(PARENT),
        QuestionSet(tuple(RECIPE.tasks), ("high",), 8, "accuracy"),
        max_tokens=RECIPE.max_tokens,
        slots=16,
    )
    accuracy = sum(answer.correct for answer in answers) / len(answers)
    assert accuracy > report["greedy"]["high"]["mean"]["accuracy"] - 0.2
