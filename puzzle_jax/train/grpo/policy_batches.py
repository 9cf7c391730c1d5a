"""From groups of rewarded answers to what an update reads: shaped rewards, advantages, and packed rows.

    reward    the reward function's, plus the soft penalty for overlong answers and the term for length at an effort
    advantage the reward relative to the group's baseline (`losses.policy.group_advantages`)
    rows      prompts with answers, packed; coefficients weigh tokens over all rows of an update

Answers without a reward (their function failed) are ignored. Shaped rewards are clipped to +-`LARGEST_REWARD`, so that
all advantages are finite in float32. A group whose advantages are all 0 gives no signal and is left out; so is a
truncated answer where `overlong_filter` is set, though it counts in its group's baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from puzzle_jax.tasks.rewards.answers import LARGEST_REWARD
from puzzle_jax.train.grpo.policy import Scores, replayed
from puzzle_jax.train.grpo.rollouts import Rollout
from puzzle_jax.train.losses import policy as losses
from puzzle_jax.train.losses.policy_settings import ResolvedPolicy
from puzzle_jax.train.rows import Example, Packed, packed


@dataclass(frozen=True, eq=False)
class RewardedGroups:
    """A step's groups with their rewards and advantages.

    Attributes:
      groups: answers to each prompt.
      rewards: shaped rewards; 0 where an answer has none.
      counted: whether an answer has a reward.
      advantages: advantages over the group's baseline; 0 where an answer has no reward.
    """

    groups: Sequence[Sequence[Rollout]]
    rewards: Float[np.ndarray, "groups answers"]
    counted: Bool[np.ndarray, "groups answers"]
    advantages: Float[np.ndarray, "groups answers"]

    @property
    def signal(self) -> Bool[np.ndarray, "groups"]:
        """Marks groups that can be learnt from: those with an advantage other than 0."""
        return np.any(self.advantages != 0, axis=1)


def reward_groups(
    groups: Sequence[Sequence[Rollout]], settings: ResolvedPolicy, limits: dict[str, int]
) -> RewardedGroups:
    """Shaped rewards and advantages of groups of equal size; `limits` holds token limits of an answer by effort."""
    counted = np.array([[member.outcome.reward is not None for member in group] for group in groups])
    rewards = np.array([[shaped_reward(member, settings, limits) for member in group] for group in groups], np.float32)
    advantages = losses.group_advantages(
        rewards,
        counted,
        baseline=settings.baseline,
        scale_by_std=settings.scale_by_std,
        clip=settings.advantage_clip or None,
    )
    return RewardedGroups(groups, rewards, counted, advantages)


def shaped_reward(rollout: Rollout, settings: ResolvedPolicy, limits: dict[str, int]) -> float:
    """The reward plus the terms for the answer's length; 0 where there is no reward."""
    reward, effort, length = rollout.outcome.reward, rollout.prompt.effort, rollout.length
    if reward is None:
        return 0.0
    if effort in settings.length_budgets:
        reward = losses.effort_length_reward(
            reward,
            length,
            settings.length_budgets[effort],
            weight=settings.length_weight,
            bonus=settings.length_bonus,
            penalty=settings.length_penalty,
        )
    if settings.overlong_cache:
        reward = reward + losses.overlong_penalty(length, limits[effort], settings.overlong_cache)
    return float(np.clip(reward, -LARGEST_REWARD, LARGEST_REWARD))


@dataclass(frozen=True)
class Learnable:
    """An answer that an update learns from."""

    rollout: Rollout
    advantage: float


def learnable(groups: RewardedGroups, settings: ResolvedPolicy) -> list[list[Learnable]]:
    """The answers that carry a loss, by group; groups without signal are left out."""

    found = [
        [
            Learnable(rollout, float(advantage))
            for rollout, counts, advantage in zip(group, of_group, advantages, strict=True)
            if counts and not (settings.overlong_filter and rollout.generated.truncated)
        ]
        for group, of_group, advantages, teaches in zip(
            groups.groups, groups.counted, groups.advantages, groups.signal, strict=True
        )
        if teaches
    ]
    return [group for group in found if group]


def examples(answers: Sequence[Learnable], settings: ResolvedPolicy, limits: dict[str, int]) -> list[Example]:
    """All answers of one update as examples, with coefficients and shares relative to all of them."""
    lengths = np.array([answer.rollout.length for answer in answers])
    coefficients = losses.token_coefficients(
        lengths, np.ones(len(answers), bool), settings.normalization, constant=max(limits.values())
    )
    share = 1.0 / float(lengths.sum())
    return [_example(answer, float(each), share) for answer, each in zip(answers, coefficients, strict=True)]


def _example(answer: Learnable, coefficient: float, share: float) -> Example:
    rollout = answer.rollout
    generated, start = rollout.generated, len(rollout.tokens)
    tokens = (*rollout.tokens, *generated.tokens)
    predicts = slice(start - 1, len(tokens) - 1)  # positions before the completion's tokens

    def at_targets(values: float | Sequence[float] | None) -> np.ndarray:
        row = np.zeros(len(tokens), np.float32)
        row[predicts] = values
        return row

    extras = {
        "coefficients": at_targets(coefficient),
        "shares": at_targets(share),
        "advantages": at_targets(answer.advantage),
        "sampler": at_targets(generated.log_probs),
    }
    if generated.experts is not None:
        extras["experts"] = replayed(generated.experts, len(tokens))
    return Example(tokens, start, extras)


def micro_batches(found: Sequence[Example], *, rows: int, length: int, pad_id: int) -> Iterator[Packed]:
    """The examples packed first-fit, the longest first, in micro-batches of `rows` rows; the last rows may be empty."""
    by_length = sorted(found, key=lambda example: -len(example.tokens))
    return packed(by_length, rows=rows, length=length, pad_id=pad_id)


def with_scores(batch: Packed, scores: Scores) -> Packed:
    """The micro-batch with the log-probabilities of `scores` added to its extras."""
    extras = {name: np.asarray(values) for name, values in scores._asdict().items() if values is not None}
    return batch._replace(extras={**batch.extras, **extras})
