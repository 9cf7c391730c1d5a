"""Every number of an evaluation, from answers and from tokens per second: summaries, differences, the frontier.

The first model is the reference, and every other is compared with it: accuracy on the same problems, retention
(accuracy over the reference's), relative request rate, and the position of its curve. All intervals come from one set
of bootstrap draws of problems (`statistics.resample`); where speed is involved, the rounds of measurement are drawn
too, each with all of its models.

Left out: the sampling error of the few requests that are timed for the speed at an effort.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate import statistics
from puzzle_jax.evaluate.frontier import Above, Curve, above_everywhere, common_gap, reachable_gap
from puzzle_jax.evaluate.statistics import Paired, Summary, by_task, paired, summarise
from puzzle_jax.generate.traces import Trace

Rates = Mapping[str, Mapping[str, Sequence[float]]]
"""Tokens per second by effort and model, one value per round; the values of all models in round i belong together."""


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval; None where it cannot be formed."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class EffortSummary:
    """Summary of one model's answers at one effort, over all tasks and by task."""

    all: Summary
    tasks: dict[str, Summary]


@dataclass(frozen=True)
class EffortComparison:
    """A model compared with the reference at one effort.

    Attributes:
      all, tasks: difference of accuracies, over all tasks and by task.
      ended: difference of the shares of answers that ended by themselves.
      retention: accuracy over the reference's.
      relative_tokens: mean generated tokens over the reference's.
      relative_tokens_per_second, relative_request_rate: ratio to the reference's; None where speed was not measured.
    """

    all: Paired
    tasks: dict[str, Paired]
    ended: Paired
    retention: Estimate
    relative_tokens: Estimate
    relative_tokens_per_second: Estimate | None
    relative_request_rate: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """A model compared with the reference: accuracy over all tasks and efforts, each effort, and the answers to the two
    questions of `evaluate.frontier`, which are None where speed was not measured.
    """

    overall: Estimate
    efforts: dict[str, EffortComparison]
    common: Above | None
    reachable: Above | None


@dataclass(frozen=True)
class Point:
    """A model at an effort: its request rate over that of the reference at the highest effort, and its accuracy."""

    rate: Estimate
    accuracy: Estimate


@dataclass(frozen=True)
class Analysis:
    """All results, by model name.

    Attributes:
      overall: accuracy over all tasks and efforts.
      summaries: summaries by effort.
      comparisons: comparisons of all models but the reference.
      points: points of the frontier, by effort; None where speed was not measured.
    """

    overall: dict[str, Estimate]
    summaries: dict[str, dict[str, EffortSummary]]
    comparisons: dict[str, Comparison]
    points: dict[str, dict[str, Point]] | None


def analyse(
    answers: Mapping[str, Sequence[Trace]], efforts: Sequence[str], rates: Rates | None, *, draws: int, seed: int
) -> Analysis:
    """Compares models by their answers to the same questions in the same order; the first model is the reference.

    Efforts are in rising order; `draws` and `seed` are those of the bootstrap. Raises PuzzleError when the models did
    not answer the same questions.
    """
    found = _Results(answers, efforts, rates, draws, seed)
    summaries = {
        name: {e: EffortSummary(summarise(chosen), by_task(chosen)) for e, chosen in found.answers[name].items()}
        for name in answers
    }
    comparisons = {
        name: Comparison(
            (found.overall(name) - found.overall(found.reference)).estimate,
            {effort: found.compare(name, effort) for effort in efforts},
            *(found.above(name) if rates else (None, None)),
        )
        for name in found.others
    }
    overall = {name: found.overall(name).estimate for name in answers}
    points = (
        {name: {e: found.point(name, e, summaries[name][e].all) for e in efforts} for name in answers}
        if rates
        else None
    )
    return Analysis(overall, summaries, comparisons, points)


@dataclass(frozen=True, eq=False)
class _Quantity:
    """A measured number, and its value in every bootstrap draw; quotients by zero are infinite."""

    value: float
    draws: Float[np.ndarray, "draws"]

    def __sub__(self, other: _Quantity) -> _Quantity:
        return _Quantity(self.value - other.value, self.draws - other.draws)

    def __truediv__(self, other: _Quantity) -> _Quantity:
        value = self.value / other.value if other.value else math.inf
        return _Quantity(value, statistics.ratio(self.draws, other.draws))

    @property
    def estimate(self) -> Estimate:
        if not math.isfinite(self.value):
            return Estimate(None, None, None)
        return Estimate(self.value, *statistics.percentile_interval(self.draws))


class _Results:
    """Accuracies, tokens and request rates of all models on the same problems.

    Request rates are in units of the reference's at its highest effort, as measured.
    """

    def __init__(
        self, answers: Mapping[str, Sequence[Trace]], efforts: Sequence[str], rates: Rates | None, draws: int, seed: int
    ) -> None:
        self.reference, *self.others = answers
        self.efforts, self.rates = tuple(efforts), rates
        self.answers = {
            name: {effort: [answer for answer in found if answer.effort == effort] for effort in efforts}
            for name, found in answers.items()
        }
        problems = {
            (name, effort): [(answer.task, answer.problem_seed) for answer in chosen]
            for name, by_effort in self.answers.items()
            for effort, chosen in by_effort.items()
        }
        asked = problems[self.reference, efforts[0]]
        for (name, effort), found in problems.items():
            if found != asked:
                raise PuzzleError(f"model {name!r} answered other problems at effort {effort!r} than the rest")
        self.tasks = np.array([task for task, _ in asked])
        self.counts = statistics.resample([task for task, _ in asked], draws, seed)
        # Each draw takes the median over resampled rounds, which are the same for every model.
        generator = np.random.default_rng([seed, 1])
        self.rounds: dict[str, Int[np.ndarray, "draws rounds"]] = {}
        for effort, by_model in (rates or {}).items():
            count = len(next(iter(by_model.values())))
            self.rounds[effort] = generator.integers(0, count, (draws, count))

    def correct(self, name: str, effort: str) -> Bool[np.ndarray, "problems"]:
        return np.array([answer.correct for answer in self.answers[name][effort]], bool)

    def ended(self, name: str, effort: str) -> Bool[np.ndarray, "problems"]:
        return np.array([not answer.truncated for answer in self.answers[name][effort]], bool)

    def accuracy(self, name: str, effort: str) -> _Quantity:
        return self._mean(self.correct(name, effort))

    def tokens(self, name: str, effort: str) -> _Quantity:
        return self._mean(np.array([len(answer.completion) for answer in self.answers[name][effort]], float))

    def overall(self, name: str) -> _Quantity:
        """Accuracy over all efforts."""
        found = [self.accuracy(name, effort) for effort in self.efforts]
        return _Quantity(
            float(np.mean([each.value for each in found])), np.mean([each.draws for each in found], axis=0)
        )

    def speed(self, name: str, effort: str) -> _Quantity:
        """Tokens per second."""
        assert self.rates is not None
        rates = np.asarray(self.rates[effort][name], float)
        return _Quantity(float(np.median(rates)), np.median(rates[self.rounds[effort]], axis=1))

    def request_rate(self, name: str, effort: str) -> _Quantity:
        rate = self.speed(name, effort) / self.tokens(name, effort)
        return _Quantity(rate.value / self._unit, rate.draws / self._unit)

    def compare(self, name: str, effort: str) -> EffortComparison:
        model, other = self.correct(name, effort), self.correct(self.reference, effort)

        def relative(quantity: Callable[[str, str], _Quantity]) -> Estimate:
            return (quantity(name, effort) / quantity(self.reference, effort)).estimate

        def of_task(task: str) -> Paired:
            chosen = self.tasks == task
            return paired(model[chosen], other[chosen], self.counts[:, chosen])

        return EffortComparison(
            all=paired(model, other, self.counts),
            tasks={task: of_task(task) for task in dict.fromkeys(self.tasks.tolist())},
            ended=paired(self.ended(name, effort), self.ended(self.reference, effort), self.counts),
            retention=relative(self.accuracy),
            relative_tokens=relative(self.tokens),
            relative_tokens_per_second=relative(self.speed) if self.rates else None,
            relative_request_rate=relative(self.request_rate) if self.rates else None,
        )

    def above(self, name: str) -> tuple[Above, Above]:
        """The answers to the two questions of `evaluate.frontier`."""
        (model, *models), (other, *others) = self._curves(name), self._curves(self.reference)
        draws = list(zip(models, others, strict=True))
        return above_everywhere(common_gap, model, other, draws), above_everywhere(reachable_gap, model, other, draws)

    def point(self, name: str, effort: str, summary: Summary) -> Point:
        accuracy = Estimate(summary.accuracy, summary.low, summary.high)
        return Point(self.request_rate(name, effort).estimate, accuracy)

    def _mean(self, values: Float[np.ndarray, "problems"] | Bool[np.ndarray, "problems"]) -> _Quantity:
        return _Quantity(float(values.mean()), statistics.means(self.counts, values))

    @cached_property
    def _unit(self) -> float:
        """Requests per second of the reference at its highest effort."""
        rate = self.speed(self.reference, self.efforts[-1]) / self.tokens(self.reference, self.efforts[-1])
        return rate.value

    def _curves(self, name: str) -> list[Curve]:
        """The measured curve, then that of every draw."""
        knots = [(self.request_rate(name, effort), self.accuracy(name, effort)) for effort in self.efforts]
        measured = Curve.of([(rate.value, accuracy.value) for rate, accuracy in knots])
        drawn = np.stack([[rate.draws, accuracy.draws] for rate, accuracy in knots]).transpose(2, 0, 1)
        return [measured, *(Curve.of([(rate, accuracy) for rate, accuracy in draw]) for draw in drawn.tolist())]
