"""Notes of a run on its answers: each is printed once, with advice on what may be wrong when no answer passes."""

import io
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.evaluate.accuracy import QuestionSet
from puzzle_jax.generate import Generated
from puzzle_jax.generate.traces import Trace
from puzzle_jax.tasks import Problem
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.train.grpo.inputs import GrpoInputs
from puzzle_jax.train.grpo.metrics import passes, rollout_metrics
from puzzle_jax.train.grpo.notes import Notes, ThresholdMonitor
from puzzle_jax.train.grpo.policy_batches import RewardedGroups
from puzzle_jax.train.grpo.prompts import Prompt, Prompts, PromptSettings
from puzzle_jax.train.grpo.rollouts import Rollout

PROMPT = Prompt(Problem("a[/b].jsonl", 7, "?", "5", where="a[/b].jsonl, line 8"), "low")


def rollout(reward, score=None, reason=None) -> Rollout:
    answer = Answer(PROMPT.problem, "low", "", "5", 1, False)
    return Rollout(PROMPT, (1,), Generated((1,), False, (0.0,), None), answer, Reward(reward, reason, score))


def rewarded(*rollouts) -> RewardedGroups:
    rewards = np.zeros((1, len(rollouts)), np.float32)
    return RewardedGroups([rollouts], rewards, np.ones(rewards.shape, bool), rewards)


def notes(threshold=None) -> tuple[Notes, io.StringIO]:
    recipe = SimpleNamespace(
        reward=SimpleNamespace(pass_threshold=threshold),
        prompts=PromptSettings(),
        update=SimpleNamespace(row_length=60),
    )
    inputs = Mock(spec=GrpoInputs, recipe=recipe, too_long=frozenset({3}), config=SimpleNamespace(max_position=768))
    inputs.most_positions.return_value = 812
    inputs.questions = QuestionSet(("chain",), ("low",), 5, "validation")
    file = io.StringIO()
    return Notes(inputs, Console(file=file, width=400)), file


@pytest.mark.parametrize(
    ("outcome", "threshold", "passed"),
    [
        (Reward(0.9, None, 1.0), None, True),
        (Reward(0.9, None, 1.0), 1.0, False),
        (Reward(0.9, None, 1.0), 0.9, True),
        (Reward(5.0, None, 0.5), None, False),
        (Reward(1.0, None), None, True),
        (Reward(0.9, None), None, False),
    ],
)
def test_which_answers_pass(outcome, threshold, passed):
    assert passes(outcome, threshold) == passed


def test_a_threshold_above_what_right_answers_earn_is_told_once():
    monitor = ThresholdMonitor(1.0)
    assert monitor.add([rollout(0.0, 0.0)]) is None
    assert "the largest was 0" in monitor.advice and "set reward.pass_threshold" in monitor.advice
    message = monitor.add([rollout(0.9, 1.0), rollout(0.3, 1.0)])
    assert message is not None and "earn up to 0.9, which is below reward.pass_threshold (1)" in message
    assert monitor.add([rollout(0.9, 1.0)]) is None and "the largest was 0.9" in monitor.advice
    monitor.add([rollout(1.0, 1.0)])
    assert monitor.advice == ""


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_nothing_is_said_where_answers_pass(threshold):
    monitor = ThresholdMonitor(threshold)
    assert monitor.add([rollout(0.9, 1.0)]) is None and monitor.advice == ""
    assert ThresholdMonitor(threshold).advice == ""  # before there are answers


def test_lost_answers_and_long_problems_are_told_once_and_counted():
    said, file = notes()
    stream = Prompts(PromptSettings())
    stream.first_too_long = PROMPT
    step = rewarded(
        rollout(None, reason="took longer than 1 s"), rollout(0.0, reason="returned [b]"), rollout(1.0, 1.0)
    )
    for number in (1, 2):
        said.step(number, step, stream)
    lines = file.getvalue().splitlines()
    assert lines == [
        "  step 1: 1 of 3 answers have no reward: the reward function took longer than 1 s",
        "  step 1: 1 of 3 answers have no reward: the reward function returned [b]",
        "  a[/b].jsonl, line 8: with its answer the prompt may take 812 tokens at effort low, more than "
        "update.row_length (60); such problems are passed over, and counted in metrics.jsonl (passed_over)",
    ]
    assert rollout_metrics(step, None)["lost"] == 2.0 and rollout_metrics(step, None)["pass_rate"] == 0.5


def test_an_evaluation_says_what_it_did_not_ask_and_what_it_could_not_score():
    said, file = notes()
    hung = Trace("chain", "low", 0, {}, (1,), (2,), 0.0, False, unscored="took longer than 10 s")
    fine = Trace("chain", "low", 1, {}, (1,), (2,), 1.0, False)
    said.evaluated([hung, fine])
    said.evaluated([fine])
    assert file.getvalue().splitlines() == [
        "  1 of the evaluation's 5 questions take, with their answers, more than the model's context (768 tokens), and "
        "are not asked",
        "  1 of 2 answers could not be scored and count as wrong (1: the scorer took longer than 10 s)",
    ]
