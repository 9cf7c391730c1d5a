"""Summaries of answers, intervals for proportions, and intervals for the differences of models on the same problems.

A proportion of one model has Wilson's interval (E. B. Wilson, JASA 22, 1927). Everything that compares models, or mixes
accuracies, tokens and speeds, is bootstrapped over problems (B. Efron, Annals of Statistics 7, 1979): a problem is
drawn with all of its answers, by every model and at every effort, so that what they share cancels; draws are stratified
by task, since the number of problems of a task is fixed by design. Problems that only one of two models solves are
counted as in McNemar's test.

A mean over tokens of texts has its standard error over texts, since tokens of one text are not independent.

Left out: corrections of the percentile interval, and more than one answer to a question. A bootstrap can only repeat
what was seen: two models that agree on every problem get an interval of zero width.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import bdtr

from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.traces import Trace

LEVEL = 0.95


def wilson(successes: int, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """The ends of Wilson's score interval of a proportion; raises ConfigError where there are no trials."""
    if not 0 <= successes <= trials or not trials:
        raise ConfigError(f"{successes} successes of {trials} trials are no share")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, shrink = successes / trials, 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / shrink
    # Without any success (or failure) one end is exactly 0 (or 1), which rounding would miss.
    return (
        0.0 if not successes else max(0.0, centre - spread),
        1.0 if successes == trials else min(1.0, centre + spread),
    )


def weighted_mean(
    values: Float[np.ndarray, "traces"], weights: Float[np.ndarray, "traces"] | Int[np.ndarray, "traces"]
) -> tuple[float, float]:
    """sum(weights * values) / sum(weights) and its standard error over traces, by linearising the ratio.

    With the tokens of a trace as its weight, this is the mean per token of values that are means over their traces.
    The error is infinite for a single trace.
    """
    mean = float(np.sum(weights * values) / np.sum(weights))
    number = len(values)
    if number < 2:
        return mean, math.inf
    return mean, float(np.sqrt(number / (number - 1) * np.sum((weights * (values - mean)) ** 2)) / np.sum(weights))


def resample(strata: Sequence[Hashable], draws: int, seed: int) -> Int[np.ndarray, "draws problems"]:
    """Counts of each problem in each bootstrap draw.

    `strata` are the problems' tasks; a draw holds as many problems of a stratum as the stratum has.
    """
    generator = np.random.default_rng(seed)
    counts = np.zeros((draws, len(strata)), np.int64)
    for stratum in dict.fromkeys(strata):
        members = [index for index, other in enumerate(strata) if other == stratum]
        share = np.full(len(members), 1 / len(members))
        counts[:, members] = generator.multinomial(len(members), share, size=draws)
    return counts


def means(
    counts: Int[np.ndarray, "draws problems"], values: Float[np.ndarray, "problems"] | Bool[np.ndarray, "problems"]
) -> Float[np.ndarray, "draws"]:
    """The mean of a value over the problems of each draw."""
    return counts @ values.astype(np.float64) / counts.sum(1)


def percentile_interval(values: Float[np.ndarray, "draws"], level: float = LEVEL) -> tuple[float | None, float | None]:
    """The ends of the central `level` of bootstrap values; None for an end that is infinite."""
    tail = (1 - level) / 2
    below, above = lower_bound(values, tail), lower_bound(-values, tail)
    return below, None if above is None else -above


def lower_bound(values: Float[np.ndarray, "draws"], tail: float = 1 - LEVEL) -> float | None:
    """The value that all but the share `tail` of bootstrap values reach; None where it is not finite."""
    # One of the values drawn, never an interpolation between a number and infinity.
    found = float(np.sort(values)[int(tail * (len(values) - 1))])
    return found if math.isfinite(found) else None


def ratio(above: Float[np.ndarray, "draws"], below: Float[np.ndarray, "draws"]) -> Float[np.ndarray, "draws"]:
    """Quotients; anything over zero is infinite."""
    return np.divide(above, below, out=np.full(len(above), np.inf), where=below != 0)


@dataclass(frozen=True)
class Paired:
    """Share of problems that a model solves, or answers as it should, minus the reference's on the same problems.

    Attributes:
      difference, low, high: the difference of the two shares, and its bootstrap interval.
      won, lost: number of problems that only the model, or only the reference, solves.
      p_value: that of McNemar's exact two-sided test: how often equal models would differ at least as much.
    """

    difference: float
    low: float | None
    high: float | None
    won: int
    lost: int
    p_value: float


def paired(
    model: Bool[np.ndarray, "problems"],
    reference: Bool[np.ndarray, "problems"],
    counts: Int[np.ndarray, "draws problems"],
) -> Paired:
    """Compares which problems two models solve, problem by problem."""
    won, lost = int((model & ~reference).sum()), int((reference & ~model).sum())
    low, high = percentile_interval(means(counts, model) - means(counts, reference))
    p_value = min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5)))  # the exact two-sided sign test
    return Paired((won - lost) / len(model), low, high, won, lost, p_value)


# Summaries of answers -----------------------------------------------------------------------------------------------

QUANTILES = (10, 50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """A set of answers in a few numbers.

    Attributes:
      accuracy, accuracy_se, low, high: share of correct answers, its standard error and 95% interval (Wilson).
      mean_reward: mean reward, which differs from the accuracy only where a task gives partial credit.
      mean_tokens: mean generated tokens; a truncated answer counts with the tokens it has.
      token_quantiles: quantiles of generated tokens, by percentage.
      truncated: share of answers that the token limit cut off.
      answers: number of answers.
      unscored: number of answers that could not be scored, which count as wrong.
      mean_right_tokens: mean generated tokens of correct answers; None where there are none.
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
    mean_right_tokens: float | None = None


def summarise(answers: Sequence[Trace]) -> Summary:
    """Summarises answers; raises ConfigError where there are none."""
    if not answers:
        raise ConfigError("there are no answers to summarise")
    count, right = len(answers), sum(answer.correct for answer in answers)
    low, high = wilson(right, count)
    accuracy = right / count
    lengths = [len(answer.completion) for answer in answers]
    of_right = [len(answer.completion) for answer in answers if answer.correct]
    return Summary(
        accuracy=accuracy,
        accuracy_se=math.sqrt(accuracy * (1 - accuracy) / count),
        low=low,
        high=high,
        mean_reward=sum(answer.known_reward for answer in answers) / count,
        mean_tokens=sum(lengths) / count,
        token_quantiles={str(q): float(np.percentile(lengths, q)) for q in QUANTILES},
        truncated=sum(answer.truncated for answer in answers) / count,
        answers=count,
        unscored=sum(answer.unscored is not None for answer in answers),
        mean_right_tokens=sum(of_right) / right if right else None,
    )


def by_effort(answers: Sequence[Trace], efforts: Sequence[str]) -> dict[str, Summary]:
    """One summary per effort, over all tasks."""
    return {effort: summarise([a for a in answers if a.effort == effort]) for effort in efforts}


def by_task(answers: Sequence[Trace]) -> dict[str, Summary]:
    """One summary per task, in the order in which they appear."""
    tasks = dict.fromkeys(answer.task for answer in answers)
    return {task: summarise([a for a in answers if a.task == task]) for task in tasks}
