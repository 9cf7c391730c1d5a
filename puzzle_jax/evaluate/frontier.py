"""Accuracy against request rate over the reasoning efforts, and whether a model's curve lies above another's.

Tokens per second are misleading: a model that is twice as fast and writes twice as much serves no more requests. The
request rate is tokens per second over generated tokens per request; relative to another model's it is (TPS / TPS') /
(tokens / tokens'), the request-level efficiency of arXiv 2602.11937. A model has one point (rate, accuracy) per
effort; its curve joins them by straight lines in the order of their rates.

Two questions are asked of a pair of curves:

- *common*: is the model's curve above the reference's at every rate from the larger of the two lowest rates to the
  smaller of the two highest, which is where both are known? There is no answer for curves whose ranges do not overlap.
- *reachable*: at every rate that the reference can serve, can the model serve it too and be more accurate? A model may
  run faster than required, so its accuracy at a rate is the best on its curve at that rate or above, and the range is
  everything up to the reference's highest rate. There is no answer for a model that does not reach this rate.

Where the model's slowest effort is faster than the reference's, the first question never considers the reference's best
accuracy; the second does. The answer to each is the smallest gap between the two curves. They are piecewise linear, so
it lies at an end of the range or at a knot of either.

Left out: traffic split between two efforts (linear in seconds per request, so below the straight line in rate).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from puzzle_jax.evaluate.statistics import lower_bound


@dataclass(frozen=True)
class Curve:
    """Points in strictly rising order of rate, joined by straight lines."""

    rates: Float[np.ndarray, "knots"]
    accuracies: Float[np.ndarray, "knots"]

    @staticmethod
    def of(points: Sequence[tuple[float, float]]) -> Curve:
        """The curve through (rate, accuracy) points in any order; of several points at one rate, the best counts."""
        best: dict[float, float] = {}
        for rate, accuracy in points:
            best[rate] = max(accuracy, best.get(rate, accuracy))
        rates = sorted(best)
        return Curve(np.array(rates, float), np.array([best[rate] for rate in rates], float))

    def reachable(self) -> Curve:
        """The best accuracy at each rate or above, a curve that never rises."""
        rates, levels = [self.rates[-1]], [self.accuracies[-1]]
        for rate, accuracy, right, at_right in zip(
            self.rates[-2::-1], self.accuracies[-2::-1], self.rates[:0:-1], self.accuracies[:0:-1], strict=True
        ):
            level = levels[-1]
            if at_right < level < accuracy:  # leftwards, the line rises through the level already reached
                rates.append(right + (rate - right) * (level - at_right) / (accuracy - at_right))
                levels.append(level)
            rates.append(rate)
            levels.append(max(level, accuracy))
        return Curve(np.array(rates[::-1]), np.array(levels[::-1]))

    def at(self, rates: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Accuracies at these rates; beyond the ends of the curve, those of its ends."""
        return np.interp(rates, self.rates, self.accuracies)


@dataclass(frozen=True)
class Gap:
    """The smallest lead of one curve over another.

    Attributes:
      accuracy, rate: smallest difference of accuracies, negative where the curve lies below, and the rate it is at.
      low, high: range of rates that was compared.
    """

    accuracy: float
    rate: float
    low: float
    high: float


def common_gap(model: Curve, reference: Curve) -> Gap | None:
    """The smallest gap over the rates that both curves cover; None where they share none."""
    low = max(model.rates[0], reference.rates[0])
    high = min(model.rates[-1], reference.rates[-1])
    return None if low > high else _smallest(model, reference, low, high)


def reachable_gap(model: Curve, reference: Curve) -> Gap | None:
    """The smallest gap in the best accuracy at a rate or above, over all rates up to the reference's highest.

    None where the model does not reach that rate.
    """
    high = reference.rates[-1]
    if model.rates[-1] < high:
        return None
    return _smallest(model.reachable(), reference.reachable(), min(model.rates[0], reference.rates[0]), high)


def _smallest(model: Curve, reference: Curve, low: float, high: float) -> Gap:
    knots = np.concatenate([model.rates, reference.rates, [low, high]])
    knots = np.unique(knots[(knots >= low) & (knots <= high)])
    gaps = model.at(knots) - reference.at(knots)
    least = int(np.argmin(gaps))
    return Gap(float(gaps[least]), float(knots[least]), float(low), float(high))


@dataclass(frozen=True)
class Above:
    """The evidence that a curve lies above another everywhere.

    Attributes:
      gap: the smallest gap of the measured curves; None where the question has no answer.
      lower_bound: one-sided bound that 95% of the draws' smallest gaps reach. Noise can only lower a minimum, so the
        bound is conservative. None where more than 5% of the draws have no answer.
      probability: share of draws in which the smallest gap is above zero; a draw without an answer counts as not above.
      answered: share of draws with an answer.
    """

    gap: Gap | None
    lower_bound: float | None
    probability: float
    answered: float


def above_everywhere(
    smallest_gap: Callable[[Curve, Curve], Gap | None],
    model: Curve,
    reference: Curve,
    draws: Sequence[tuple[Curve, Curve]],
) -> Above:
    """Answers one of the two questions (`common_gap` or `reachable_gap`) for measured curves.

    Each of `draws` is a pair of curves (model, reference) from one bootstrap draw of problems.
    """
    found = [smallest_gap(*pair) for pair in draws]
    gaps = np.array([-np.inf if gap is None else gap.accuracy for gap in found], float)
    return Above(
        smallest_gap(model, reference),
        lower_bound(gaps),
        float((gaps > 0).mean()),
        float(np.isfinite(gaps).mean()),
    )
