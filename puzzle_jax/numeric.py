"""Numbers of costs and scores: which values are usable, their exact decimal fractions, and their text in messages."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np

Number = int | float

LARGEST = 1e100
"""Largest size of a usable number: sums, squares and quotients of such numbers stay finite."""


def is_number(value: object) -> bool:
    """Returns whether a value is a number that sums can be formed of: finite, and not so large that they overflow."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-LARGEST <= value <= LARGEST)


def exact(value: Any) -> Fraction:
    """A number as it is written: 0.1 is a tenth, so that 0.1 + 0.2 is 0.3."""
    return Fraction(int(value)) if isinstance(value, int | np.integer) else Fraction(repr(float(value)))


def short(value: Number, direction: int) -> str:
    """Six digits, rounded so that the number stays feasible; whole numbers in full."""
    if float(value).is_integer() and abs(value) < 1e15:
        return str(int(value))
    rounding = {1: ROUND_CEILING, -1: ROUND_FLOOR}.get(direction)
    return f"{Context(prec=6, rounding=rounding).create_decimal(Decimal(repr(float(value)))):g}"


def median_error(values: Sequence[float]) -> float:
    """The relative standard error of a median, by the interquartile range, as of a normal distribution."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return 0.93 * (high - low) / middle / len(values) ** 0.5
