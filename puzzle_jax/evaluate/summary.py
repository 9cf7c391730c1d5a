"""Accuracy, tokens and truncation of a model's answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.statistics import wilson
from puzzle_jax.generate.traces import Trace

QUANTILES = (10, 50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """Answers in a few numbers.

    Attributes:
      accuracy: share of right answers.
      accuracy_se: its standard error.
      low, high: its 95% interval (Wilson).
      mean_reward: differs from the accuracy only where a task gives partial credit.
      mean_tokens: generated, truncated answers included with what they have.
      token_quantiles: percent -> generated tokens.
      truncated: share of answers that the token limit cut.
      answers: how many there are.
      unscored: how many of them could not be scored, and count as wrong.
    """

    accuracy: float
    accuracy_se: float
    low: float
    high: float
    mean_reward: float
    mean_tokens: float
    token_quantiles: dict[str, float]
    truncated: float
    answers: int
    unscored: int = 0


def summarise(answers: Sequence[Trace]) -> Summary:
    """Raises ConfigError when there are no answers."""
    if not answers:
        raise ConfigError("there are no answers to summarise")
    count, right = len(answers), sum(answer.correct for answer in answers)
    interval = wilson(right, count)
    accuracy = right / count
    lengths = [len(answer.completion) for answer in answers]
    assert interval.low is not None and interval.high is not None
    return Summary(
        accuracy=accuracy,
        accuracy_se=math.sqrt(accuracy * (1 - accuracy) / count),
        low=interval.low,
        high=interval.high,
        mean_reward=sum(answer.judged_reward for answer in answers) / count,
        mean_tokens=sum(lengths) / count,
        token_quantiles={str(q): float(np.percentile(lengths, q)) for q in QUANTILES},
        truncated=sum(answer.truncated for answer in answers) / count,
        answers=count,
        unscored=sum(answer.unscored is not None for answer in answers),
    )


def by_effort(answers: Sequence[Trace], efforts: Sequence[str]) -> dict[str, Summary]:
    """One summary per effort, over all tasks."""
    return {effort: summarise([a for a in answers if a.effort == effort]) for effort in efforts}


def by_task(answers: Sequence[Trace]) -> dict[str, Summary]:
    """One summary per task, in the order in which they appear."""
    tasks = dict.fromkeys(answer.task for answer in answers)
    return {task: summarise([a for a in answers if a.task == task]) for task in tasks}
