"""Every number of an evaluation, from answers and from tokens per second: summaries, differences, the frontier.

The first model is the reference, and every other is compared with it: accuracy on the same problems, retention
(accuracy over the reference's), relative request rate, and the position of its curve. All intervals of these come from
one set of bootstrap draws (`statistics.resample`) of problems; where speed is involved, the rounds of measurement
are drawn too, each with all of its models.

Left out: the error that comes from drawing few requests for the speed at an effort.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.frontier import Above, Curve, above_everywhere, common_gap, reachable_gap
from puzzle_jax.evaluate.statistics import (
    Interval,
    Paired,
    Summary,
    by_task,
    means,
    paired,
    percentile_interval,
    ratio,
    resample,
    summarise,
)
from puzzle_jax.generate.traces import Trace

Rates = Mapping[str, Mapping[str, Sequence[float]]]
"""Tokens per second by effort and model, one value per round; round i of all models belongs together."""


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval; None where it cannot be formed."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class EffortSummary:
    """Answers of one model at one effort: over all tasks, and by task."""

    all: Summary
    tasks: dict[str, Summary]


@dataclass(frozen=True)
class EffortComparison:
    """A model against the reference at one effort.

    Attributes:
      all, tasks: difference of accuracies, over all tasks and by task.
      retention: accuracy over the reference's.
      relative_tokens: mean generated tokens over the reference's.
      relative_tokens_per_second: over the reference's; None where speed was not measured, as is
      relative_request_rate: the former over the one before.
    """

    all: Paired
    tasks: dict[str, Paired]
    retention: Estimate
    relative_tokens: Estimate
    relative_tokens_per_second: Estimate | None
    relative_request_rate: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """A model against the reference.

    Attributes:
      overall: difference of the accuracies over all tasks and efforts.
      efforts: by effort.
      common, reachable: the two questions of `evaluate.frontier`; None where speed was not measured.
    """

    overall: Estimate
    efforts: dict[str, EffortComparison]
    common: Above | None
    reachable: Above | None


@dataclass(frozen=True)
class Point:
    """A model at an effort: request rate over the reference's at its highest effort, and accuracy."""

    rate: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Analysis:
    """All results, by model name.

    Attributes:
      overall: accuracy over all tasks and efforts.
      summaries: by effort.
      comparisons: of all models but the reference.
      points: of the frontier, by effort; None where speed was not measured.
    """

    overall: dict[str, Estimate]
    summaries: dict[str, dict[str, EffortSummary]]
    comparisons: dict[str, Comparison]
    points: dict[str, dict[str, Point]] | None


def analyse(
    answers: Mapping[str, Sequence[Trace]], efforts: Sequence[str], rates: Rates | None, *, draws: int, seed: int
) -> Analysis:
    """Compares models.

    Args:
      answers: of every model to the same questions in the same order; the first model is the reference.
      efforts: in rising order.
      rates: tokens per second.
      draws: of the bootstrap.
      seed: of the draws.

    Raises PuzzleError when the models did not answer the same questions.
    """
    table = _Table(answers, efforts)
    boot = _Bootstrap(table, rates, draws, seed)
    reference, *others = answers
    summaries = {
        name: {
            effort: EffortSummary(summarise(chosen), by_task(chosen))
            for effort in efforts
            for chosen in [[a for a in found if a.effort == effort]]
        }
        for name, found in answers.items()
    }
    comparisons = {
        name: Comparison(
            _estimate(table.overall(name) - table.overall(reference), boot.overall(name) - boot.overall(reference)),
            {effort: _compare(table, boot, name, reference, effort) for effort in efforts},
            *(_above(boot, name, reference) if rates else (None, None)),
        )
        for name in others
    }
    overall = {name: _estimate(table.overall(name), boot.overall(name)) for name in answers}
    return Analysis(overall, summaries, comparisons, _points(boot, summaries) if rates else None)


class _Table:
    """Right answers and tokens as arrays over problems, which are the same for every model and effort."""

    def __init__(self, answers: Mapping[str, Sequence[Trace]], efforts: Sequence[str]) -> None:
        self.efforts, self.names = tuple(efforts), tuple(answers)
        self.correct: dict[tuple[str, str], Bool[np.ndarray, "problems"]] = {}
        self.tokens: dict[tuple[str, str], Float[np.ndarray, "problems"]] = {}
        asked: list[tuple[str, int]] | None = None
        for name, found in answers.items():
            for effort in efforts:
                chosen = [a for a in found if a.effort == effort]
                problems = [(a.task, a.problem_seed) for a in chosen]
                if asked is not None and problems != asked:
                    raise PuzzleError(f"model {name!r} answered other problems at effort {effort!r} than the rest")
                asked = problems
                self.correct[name, effort] = np.array([a.correct for a in chosen], bool)
                self.tokens[name, effort] = np.array([len(a.completion) for a in chosen], float)
        self.tasks = [task for task, _ in asked or []]

    def overall(self, name: str) -> float:
        """Accuracy over all efforts."""
        return float(np.mean([self.correct[name, effort].mean() for effort in self.efforts]))


class _Bootstrap:
    """Accuracies, mean tokens and request rates, measured and in every draw.

    Request rates are in units of the reference's at its highest effort, as measured.
    """

    def __init__(self, table: _Table, rates: Rates | None, draws: int, seed: int) -> None:
        self.table, self.rates, self.draws, self.seed = table, rates, draws, seed
        self.counts = resample(table.tasks, draws, seed)

    def accuracy(self, name: str, effort: str) -> Float[np.ndarray, "draws"]:
        return means(self.counts, self.table.correct[name, effort])

    def overall(self, name: str) -> Float[np.ndarray, "draws"]:
        return np.mean([self.accuracy(name, effort) for effort in self.table.efforts], axis=0)

    def tokens(self, name: str, effort: str) -> Float[np.ndarray, "draws"]:
        return means(self.counts, self.table.tokens[name, effort])

    @cached_property
    def rounds(self) -> dict[str, Int[np.ndarray, "draws rounds"]]:
        """Rounds that each draw takes the median of, by effort; the same of every model."""
        assert self.rates is not None
        generator = np.random.default_rng([self.seed, 1])
        counts = {effort: len(next(iter(by_model.values()))) for effort, by_model in self.rates.items()}
        return {effort: generator.integers(0, count, (self.draws, count)) for effort, count in counts.items()}

    def measured_speed(self, name: str, effort: str) -> float:
        assert self.rates is not None
        return float(np.median(self.rates[effort][name]))

    def speed(self, name: str, effort: str) -> Float[np.ndarray, "draws"]:
        assert self.rates is not None
        return np.median(np.asarray(self.rates[effort][name], float)[self.rounds[effort]], axis=1)

    @cached_property
    def unit(self) -> float:
        """Requests per second."""
        reference, highest = self.table.names[0], self.table.efforts[-1]
        return self.measured_speed(reference, highest) / float(self.table.tokens[reference, highest].mean())

    def measured_request_rate(self, name: str, effort: str) -> float:
        return self.measured_speed(name, effort) / float(self.table.tokens[name, effort].mean()) / self.unit

    def request_rate(self, name: str, effort: str) -> Float[np.ndarray, "draws"]:
        return self.speed(name, effort) / self.tokens(name, effort) / self.unit

    def measured_curve(self, name: str) -> Curve:
        efforts, correct = self.table.efforts, self.table.correct
        return Curve.of([(self.measured_request_rate(name, e), float(correct[name, e].mean())) for e in efforts])

    def curves(self, name: str) -> list[Curve]:
        """The curve in every draw."""
        rates = np.stack([self.request_rate(name, e) for e in self.table.efforts], axis=1)
        accuracies = np.stack([self.accuracy(name, e) for e in self.table.efforts], axis=1)
        return [
            Curve.of(list(zip(*draw, strict=True))) for draw in zip(rates.tolist(), accuracies.tolist(), strict=True)
        ]


def _estimate(value: float | None, draws: Float[np.ndarray, "draws"]) -> Estimate:
    interval = Interval(None, None) if value is None else percentile_interval(draws)
    return Estimate(value, interval.low, interval.high)


def _compare(table: _Table, boot: _Bootstrap, name: str, reference: str, effort: str) -> EffortComparison:
    model, other = table.correct[name, effort], table.correct[reference, effort]
    tasks = np.array(table.tasks)
    tokens = ratio(boot.tokens(name, effort), boot.tokens(reference, effort))
    speed = rate = None
    if boot.rates:
        speed = _estimate(
            boot.measured_speed(name, effort) / boot.measured_speed(reference, effort),
            ratio(boot.speed(name, effort), boot.speed(reference, effort)),
        )
        rate = _estimate(
            boot.measured_request_rate(name, effort) / boot.measured_request_rate(reference, effort),
            ratio(boot.request_rate(name, effort), boot.request_rate(reference, effort)),
        )
    return EffortComparison(
        all=paired(model, other, boot.counts),
        tasks={
            task: paired(model[tasks == task], other[tasks == task], boot.counts[:, tasks == task])
            for task in dict.fromkeys(table.tasks)
        },
        retention=_estimate(
            float(model.mean() / other.mean()) if other.any() else None,
            ratio(boot.accuracy(name, effort), boot.accuracy(reference, effort)),
        ),
        relative_tokens=_estimate(
            float(table.tokens[name, effort].mean() / table.tokens[reference, effort].mean()), tokens
        ),
        relative_tokens_per_second=speed,
        relative_request_rate=rate,
    )


def _above(boot: _Bootstrap, name: str, reference: str) -> tuple[Above, Above]:
    draws = list(zip(boot.curves(name), boot.curves(reference), strict=True))
    model, other = boot.measured_curve(name), boot.measured_curve(reference)
    return above_everywhere(common_gap, model, other, draws), above_everywhere(reachable_gap, model, other, draws)


def _points(boot: _Bootstrap, summaries: Mapping[str, Mapping[str, EffortSummary]]) -> dict[str, dict[str, Point]]:
    def point(name: str, effort: str) -> Point:
        summary = summaries[name][effort].all
        return Point(
            _estimate(boot.measured_request_rate(name, effort), boot.request_rate(name, effort)),
            Estimate(summary.accuracy, summary.low, summary.high),
        )

    return {name: {effort: point(name, effort) for effort in boot.table.efforts} for name in boot.table.names}
