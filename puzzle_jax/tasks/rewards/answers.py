"""An answer, and its reward or the reason why it got none."""

from __future__ import annotations

from dataclasses import dataclass, field

from puzzle_jax.tasks.base import Problem

LARGEST_REWARD = 1e30
"""Largest absolute value of a reward: sums and differences of such rewards are finite in float32."""


@dataclass(frozen=True)
class Answer:
    """An answer as a reward function receives it.

    Attributes:
      problem, effort: the question, and the reasoning effort it was asked at.
      analysis, final: texts of the two channels.
      tokens: number of tokens of the completion.
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
    """The reward of an answer.

    Attributes:
      reward: a finite number; None where a user's function gave none, 0 where a task's own scorer failed.
      reason: why the reward was lost, as one short clause ("raised ValueError: no number", "took longer than 10 s",
        "returned nan", "ended its process with exit code 3"); None if it was not.
      score: the task's own score, if it was computed. Not compared.
    """

    reward: float | None
    reason: str | None
    score: float | None = field(default=None, compare=False)
