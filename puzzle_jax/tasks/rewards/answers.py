"""An answer that is to be rewarded, and the reward that it got or the reason why it got none."""

from __future__ import annotations

from dataclasses import dataclass, field

from puzzle_jax.tasks.base import Problem

LARGEST_REWARD = 1e30
"""Absolute value up to which a number is a reward: sums and differences of such rewards are finite in float32."""


@dataclass(frozen=True)
class Answer:
    """What is judged.

    Attributes:
      problem: what was asked.
      effort: reasoning effort that was asked for.
      analysis: text of the analysis channel.
      final: text of the final channel.
      tokens: number of the completion's.
      truncated: whether the completion was cut off at its limit.
    """

    problem: Problem
    effort: str
    analysis: str
    final: str
    tokens: int
    truncated: bool


@dataclass(frozen=True)
class Reward:
    """What an answer is worth.

    Attributes:
      reward: the finite number; None where a user's function gave none, 0 where a task's own score could not be had.
      reason: why it was lost, as one short clause ("raised ValueError: no number", "took longer than 10 s",
        "returned nan", "ended its process with exit code 3"); None where it was not.
      score: what the task's own scorer gave, where it was asked. Not compared.
    """

    reward: float | None
    reason: str | None
    score: float | None = field(default=None, compare=False)
