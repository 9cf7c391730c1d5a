"""From groups of rewarded answers to what an update reads: shaped rewards, advantages, and packed rows.

    reward    the reward function's, with the soft penalty for overlong answers and the share for length at an effort
    advantage over the group's baseline (`losses.policy.group_advantages`)
    rows      prompts with answers, packed; coefficients weigh tokens over all rows of an update

Answers without a reward (their function failed) count nowhere. Shaped rewards are kept within `LARGEST_REWARD`, so that
all advantages are finite in float32. A group whose advantages are all 0 teaches nothing and is left out; so is an
answer that was cut off, where `overlong_filter` asks for it: it counts in its group's baseline only.
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
      rewards: shaped; 0 where an answer was lost.
      counted: whether there is a reward.
      advantages: over the group's baseline; 0 where an answer does not count.
    """

    groups: Sequence[Sequence[Rollout]]
    rewards: Float[np.ndarray, "groups answers"]
    counted: Bool[np.ndarray, "groups answers"]
    advantages: Float[np.ndarray, "groups answers"]

    @property
    def signal(self) -> Bool[np.ndarray, "groups"]:
        """Which groups teach something."""
        return np.any(self.advantages != 0, axis=1)


def reward_groups(
    groups: Sequence[Sequence[Rollout]], settings: ResolvedPolicy, limits: dict[str, int]
) -> RewardedGroups:
    """Shaped rewards and advantages of groups of equal size; `limits` are tokens of an answer by effort."""
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
    """The reward with what the answer's length adds; 0 where there is none."""
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
    """By group, of groups that teach something, the answers that carry a loss."""

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
    """All answers of one update as examples; their coefficients and shares are over all of them."""
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
    """The examples packed first-fit, the longest first, in micro-batches of `rows` rows; the last ones may be empty."""
    by_length = sorted(found, key=lambda example: -len(example.tokens))
    return packed(by_length, rows=rows, length=length, pad_id=pad_id)


def with_scores(batch: Packed, scores: Scores) -> Packed:
    """The micro-batch with the log-probabilities that were asked for."""
    extras = {name: np.asarray(values) for name, values in scores._asdict().items() if values is not None}
    return batch._replace(extras={**batch.extras, **extras})
