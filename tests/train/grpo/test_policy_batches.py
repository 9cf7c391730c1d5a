"""Rewards and advantages of a step's answers, and their packing into rows, on answers written by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.generate import Generated
from puzzle_jax.tasks import Problem
from puzzle_jax.tasks.rewards.answers import LARGEST_REWARD, Answer, Reward
from puzzle_jax.train.grpo.policy import Scores
from puzzle_jax.train.grpo.policy_batches import (
    Learnable,
    examples,
    learnable,
    micro_batches,
    reward_groups,
    shaped_reward,
    with_scores,
)
from puzzle_jax.train.grpo.prompts import Prompt
from puzzle_jax.train.grpo.rollouts import Rollout
from puzzle_jax.train.losses.policy_settings import NAMES, PolicySettings
from tests.support import present

LIMITS = {"low": 10, "medium": 16, "high": 14}
PAD, LAYERS, K = 77, 3, 2
FIRST = 60  # first token of every prompt


def answered(reward, length=5, effort="low", prompt=3, truncated=False, experts=False):
    """An answer of tokens 1, 2, ... with log-probabilities -1/8, -2/8, ...; a reward of None means it has none."""
    problem = Problem("add", 7, "2 + 3?", "5")
    tokens = tuple(range(1, length + 1))
    chosen = np.arange((prompt + length - 1) * LAYERS * K, dtype=np.uint8).reshape(-1, LAYERS, K) if experts else None
    generated = Generated(tokens, truncated, tuple(-token / 8 for token in tokens), chosen)
    outcome = Reward(reward, None if reward is not None else "raised ValueError")
    answer = Answer(problem, effort, "", "5", length, truncated)
    return Rollout(Prompt(problem, effort), tuple(range(FIRST, FIRST + prompt)), generated, answer, outcome)


def settings(**changes):
    plain = {"baseline": "leave_one_out", "scale_by_std": False, "overlong_filter": False}
    return PolicySettings(**{**plain, **changes}).resolved


def judged(*groups, **changes):
    return reward_groups([[answered(reward) for reward in group] for group in groups], settings(**changes), LIMITS)


# Rewards and advantages


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_the_largest_rewards_have_finite_advantages(name, baseline):
    absurd = {"length_budgets": {"low": 1}, "length_penalty": 1e6, "length_bonus": 1e6}
    for changes in ({}, absurd):
        resolved = PolicySettings(name=name, baseline=baseline, **changes).resolved
        group = [answered(reward) for reward in (LARGEST_REWARD, -LARGEST_REWARD, 0.5, None)]
        found = reward_groups([group], resolved, LIMITS)
        assert np.isfinite(found.advantages).all() and np.isfinite(found.rewards).all()
        assert changes or found.advantages[0, 0] > 0 > found.advantages[0, 1]


def test_lost_answers_count_nowhere():
    found = judged((1.0, 0.0, None, 0.5), (0.25, 0.25, 0.25, 0.25), (None, None, None, 1.0), (None,) * 4)
    np.testing.assert_array_equal(found.counted[[0, 2]], [[True, True, False, True], [False, False, False, True]])
    np.testing.assert_array_equal(found.rewards[0], [1.0, 0.0, 0.0, 0.5])
    # With three rewards, 3/2 of the distance to their mean of 0.5. Equal rewards or a single one carry no signal.
    np.testing.assert_allclose(found.advantages[0], [0.75, -0.75, 0.0, 0.0], rtol=1e-6)
    assert (found.advantages[1:] == 0).all()
    np.testing.assert_array_equal(found.signal, [True, False, False, False])


def test_the_settings_choose_baseline_scale_and_clip():
    rewards = (1.0, 0.0, None, 0.5)
    of_mean = judged(rewards, baseline="group_mean").advantages[0]
    np.testing.assert_allclose(of_mean, [0.5, -0.5, 0.0, 0.0], rtol=1e-6)
    scaled = judged(rewards, baseline="group_mean", scale_by_std=True).advantages[0]
    np.testing.assert_allclose(scaled, np.array([0.5, -0.5, 0.0, 0.0]) * 6**0.5, rtol=1e-5)  # the std is 1/sqrt(6)
    clipped = judged(rewards, scale_by_std=True, advantage_clip=1.25).advantages[0]
    np.testing.assert_allclose(clipped, [1.25, -1.25, 0.0, 0.0], rtol=1e-6)
    unclipped = judged(rewards, scale_by_std=True, advantage_clip=0.0).advantages[0]
    np.testing.assert_allclose(unclipped[0], 0.75 * 6**0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reward", "length", "effort", "expected"),
    [
        (1.0, 2, "low", 1.0 + 0.4 * 0.375),  # 0.5 (1 - 2 / 8), gained
        (1.0, 8, "low", 1.0),
        (0.0, 2, "low", 0.0),  # incorrect answers gain nothing
        (1.0, 12, "low", 1.0 - 0.2 * 0.25),  # 0.5 (1 - 12 / 8), lost
        (0.0, 12, "low", -0.2 * 0.25),
        (1.0, 12, "medium", 1.0),  # no budget
        (None, 2, "low", 0.0),
    ],
)
def test_budgets_of_length_are_by_effort(reward, length, effort, expected):
    chosen = settings(length_budgets={"low": 8, "high": 3}, length_weight=0.5, length_bonus=0.4, length_penalty=0.2)
    assert shaped_reward(answered(reward, length, effort), chosen, LIMITS) == pytest.approx(expected)


def test_what_a_short_answer_gains_ends_at_the_bonus():
    chosen = settings(length_budgets={"high": 20}, length_weight=4.0, length_bonus=0.4)
    assert shaped_reward(answered(0.5, 2, "high"), chosen, LIMITS) == pytest.approx(0.5 + 0.4 * 0.5)


def test_near_its_limit_an_answer_loses_up_to_1():
    chosen = settings(overlong_cache=4)
    found = [shaped_reward(answered(0.5, length), chosen, LIMITS) for length in (6, 7, 8, 10)]
    assert found == pytest.approx([0.5, 0.25, 0.0, -0.5])
    assert shaped_reward(answered(0.5, 10, "medium"), chosen, LIMITS) == 0.5  # its limit is 16
    assert shaped_reward(answered(None, 10), chosen, LIMITS) == 0.0
    both = settings(overlong_cache=4, length_budgets={"low": 5}, length_penalty=0.25)
    assert shaped_reward(answered(0.5, 10), both, LIMITS) == pytest.approx(0.5 - 0.25 - 1.0)


def test_advantages_are_of_shaped_rewards():
    group = [answered(1.0, 4), answered(1.0, 8)]
    assert not reward_groups([group], settings(), LIMITS).signal[0]
    found = reward_groups([group], settings(length_budgets={"low": 8}, length_bonus=0.5), LIMITS)
    np.testing.assert_allclose(found.rewards, [[1.25, 1.0]])
    np.testing.assert_allclose(found.advantages, [[0.25, -0.25]])


# What carries a loss


def test_groups_without_signal_and_lost_answers_are_left_out():
    found = judged((1.0, 0.0, None, 0.5), (1.0, 1.0, 1.0, None), (0.0, 0.25, 0.25, 0.25))
    groups = learnable(found, settings())
    assert [[one.rollout.outcome.reward for one in group] for group in groups] == [
        [1.0, 0.0, 0.5],  # the last has an advantage of 0, but its tokens count in the means
        [0.0, 0.25, 0.25, 0.25],
    ]
    assert [one.advantage for one in groups[0]] == pytest.approx([0.75, -0.75, 0.0])
    assert [one.advantage for one in groups[1]] == pytest.approx([-0.25, 1 / 12, 1 / 12, 1 / 12])


def test_cut_off_answers_count_in_the_baseline_alone():
    cut = [answered(0.0, truncated=True), answered(1.0), answered(0.5, truncated=True)]
    all_cut = [answered(reward, truncated=True) for reward in (0.0, 1.0, 1.0)]
    found = reward_groups([cut, all_cut], settings(), LIMITS)
    filtered = learnable(found, settings(overlong_filter=True))
    assert [[one.rollout for one in group] for group in filtered] == [[cut[1]]]
    assert filtered[0][0].advantage == pytest.approx(0.75)  # relative to the two that were cut off
    assert [len(group) for group in learnable(found, settings())] == [3, 3]


# Rows


@pytest.mark.parametrize(
    ("normalization", "coefficients"),
    [
        ("token", (1 / 8, 1 / 8)),
        ("sequence", (1 / (2 * 3), 1 / (2 * 5))),
        ("constant", (1 / (2 * 16), 1 / (2 * 16))),  # the highest limit
    ],
)
def test_extras_lie_at_the_position_before_their_token(normalization, coefficients):
    answers = [
        Learnable(answered(1.0, 3, prompt=4, experts=True), 0.75),
        Learnable(answered(0.0, 5, prompt=2, experts=True), -1.5),
    ]
    first, second = examples(answers, settings(normalization=normalization), LIMITS)
    assert first.tokens == (60, 61, 62, 63, 1, 2, 3) and second.tokens == (60, 61, 1, 2, 3, 4, 5)
    assert (first.prompt_length, second.prompt_length) == (4, 2)
    np.testing.assert_allclose(first.extras["coefficients"], np.array([0, 0, 0, 1, 1, 1, 0]) * coefficients[0])
    np.testing.assert_allclose(second.extras["coefficients"], np.array([0, 1, 1, 1, 1, 1, 0]) * coefficients[1])
    np.testing.assert_array_equal(first.extras["shares"], [0, 0, 0, 1 / 8, 1 / 8, 1 / 8, 0])
    np.testing.assert_array_equal(second.extras["shares"], [0, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 8, 0])
    np.testing.assert_array_equal(first.extras["advantages"], [0, 0, 0, 0.75, 0.75, 0.75, 0])
    np.testing.assert_array_equal(second.extras["sampler"], [0, -0.125, -0.25, -0.375, -0.5, -0.625, 0])
    chosen = present(answers[0].rollout.generated.experts)
    assert first.extras["experts"].shape == (7, LAYERS, K) and first.extras["experts"].dtype == np.uint8
    np.testing.assert_array_equal(first.extras["experts"], np.concatenate([chosen, chosen[-1:]]))


def test_without_replay_there_are_no_experts():
    (found,) = examples([Learnable(answered(1.0), 0.5)], settings(), LIMITS)
    assert set(found.extras) == {"coefficients", "shares", "advantages", "sampler"}


def packed(rows=2, length=12):
    """Answers of 4, 3, 6, 2 and 5 tokens after prompts of 3, 1, 3, 1 and 7."""
    sizes = ((4, 3), (3, 1), (6, 3), (2, 1), (5, 7))
    answers = [Learnable(answered(1.0, of, prompt=prompt, experts=True), (of - 4) / 4) for of, prompt in sizes]
    found = examples(answers, settings(normalization="sequence"), LIMITS)
    return list(micro_batches(found, rows=rows, length=length, pad_id=PAD))


def test_the_longest_are_packed_first_and_each_row_holds_what_fits():
    one, two = packed()
    # 12, 9, 7, 4 and 3 tokens: the 4 fit only beside the 7, the 3 beside the 9.
    np.testing.assert_array_equal(one.segment_ids, [[1] * 12, [1] * 9 + [2] * 3])
    np.testing.assert_array_equal(two.segment_ids, [[1] * 7 + [2] * 4 + [0], [0] * 12])
    np.testing.assert_array_equal(one.tokens[1], [60, 61, 62, 1, 2, 3, 4, 5, 6, 60, 1, 2])
    np.testing.assert_array_equal(two.tokens[0], [60, 61, 62, 1, 2, 3, 4, 60, 1, 2, 3, PAD])
    np.testing.assert_array_equal(one.extras["advantages"][1], [0, 0, *[0.5] * 6, 0, -0.5, -0.5, 0])
    np.testing.assert_array_equal(two.extras["sampler"][0], np.array([0, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0]) / -8)
    for batch in (one, two):
        np.testing.assert_array_equal(batch.weights > 0, batch.extras["coefficients"] > 0)
        np.testing.assert_array_equal(batch.weights > 0, batch.extras["shares"] > 0)


def test_rows_that_nothing_fills_are_padding():
    _, two = packed()
    assert (two.tokens[1] == PAD).all() and (two.weights[1] == 0).all()
    assert all((values[1] == 0).all() for values in two.extras.values())
    assert two.extras["experts"].shape == (2, 12, LAYERS, K) and two.extras["experts"].dtype == np.uint8


def test_shares_and_coefficients_add_up_to_1_over_all_rows():
    for rows in (1, 2, 5):
        batches = packed(rows)
        assert [len(batch.tokens) for batch in batches] == [rows] * -(-3 // rows)
        for name in ("coefficients", "shares"):
            assert sum(batch.extras[name].sum(dtype=np.float64) for batch in batches) == pytest.approx(1.0)
        np.testing.assert_allclose(np.unique(batches[0].extras["shares"])[1:], [1 / 20])


def test_nothing_to_learn_from_fills_no_row():
    assert list(micro_batches([], rows=2, length=12, pad_id=PAD)) == []


def test_scores_stand_beside_the_other_extras():
    one, _ = packed()
    before = set(one.extras)
    old, reference = (jnp.asarray(scale * one.extras["sampler"]) for scale in (2.0, 3.0))
    both = with_scores(one, Scores(old, reference))
    np.testing.assert_array_equal(both.extras["old"], 2 * one.extras["sampler"])
    np.testing.assert_array_equal(both.extras["reference"], 3 * one.extras["sampler"])
    assert set(with_scores(one, Scores(None, reference)).extras) == before | {"reference"}
    assert set(with_scores(one, Scores(None, None)).extras) == before == set(one.extras)
    assert both.tokens is one.tokens and all(both.extras[name] is one.extras[name] for name in before)
