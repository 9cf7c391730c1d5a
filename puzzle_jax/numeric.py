"""Numbers in costs and scores: which values are usable, their exact decimal fractions, and their form in messages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np

Number = int | float

LARGEST = 1e100
"""Largest magnitude of a usable number: sums, squares and quotients of such numbers stay finite."""


def is_number(value: object) -> bool:
    """Returns whether a value is a number that can be summed: finite, and not so large that sums overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST <= value <= LARGEST)


def exact(value: Any) -> Fraction:
    """The exact value of a number as it is written: 0.1 is a tenth, so that 0.1 + 0.2 is 0.3."""
    return Fraction(int(value)) if isinstance(value, int | np.integer) else Fraction(repr(float(value)))


def short(value: Number, direction: int) -> str:
    """A number in six digits, rounded up (direction 1) or down (-1) so that it stays feasible; integers in full."""
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    rounding = {1: ROUND_CEILING, -1: ROUND_FLOOR}.get(direction)
    return f"{Context(prec=6, rounding=rounding).create_decimal(Decimal(repr(float(value)))):g}"


def median_error(values: Sequence[float]) -> float:
    """The relative standard error of a median, from the interquartile range as for a normal distribution."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return 0.93 * (high - low) / middle / len(values) ** 0.5
