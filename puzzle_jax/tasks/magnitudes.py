"""How large, and how small, the value of a formula can be, found without computing what may be too large to compute.

A `Magnitude` holds |value| between 2^least and 2^most, and the value itself where it is a modest fraction. Sums can
cancel, so that nothing is known of how small they are; what is divided by them is unbounded, and no function takes it
that grows. Symbols count as 1.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from fractions import Fraction

_MOST_BITS = 20_000  # of an exact number, and of any other
_ROUNDING = 1e-6  # of logarithms
_GREATEST_ARGUMENT_BITS = math.log2(1000) + _ROUNDING
_LEAST_LOGARITHM = 1000.0  # also next to poles: atan of what floats cannot tell from i is 19
_MOST_UNBOUNDED = 10  # power of what has no bound, as tan(x)**3
_NO_LIMIT = math.inf

_GROWING = frozenset({"exp", "sinh", "cosh", "sin", "cos"})  # the last two along the imaginary axis
_WITH_POLES = frozenset({"tan", "sec", "csc", "cot", "tanh"})
_LOGARITHMIC = frozenset({"log", "ln", "asin", "acos", "atan", "asinh", "acosh", "atanh"})


@dataclass(frozen=True)
class Magnitude:
    """The size of a number.

    Attributes:
      most, least: logarithms to base 2 of bounds of the absolute value; infinite where there is none. Both are of the
        value with 1 in the place of every symbol.
      value: the number itself, if it is a fraction that is known.
    """

    most: float
    least: float
    value: Fraction | None = None

    @staticmethod
    def of(value: int | float | Fraction) -> Magnitude | None:
        """Of a number; None where it has too many digits."""
        exact = Fraction(value)
        if exact.numerator.bit_length() + exact.denominator.bit_length() > _MOST_BITS:
            return None
        if not exact:
            return Magnitude(-_NO_LIMIT, -_NO_LIMIT, exact)
        about = math.log2(abs(exact.numerator)) - math.log2(exact.denominator)
        return Magnitude(about + _ROUNDING, about - _ROUNDING, exact)

    def without_value(self) -> Magnitude:
        """Of the same size, but not this number."""
        return Magnitude(self.most, self.least)

    def __neg__(self) -> Magnitude:
        return Magnitude(self.most, self.least, None if self.value is None else -self.value)

    def combined(self, operator: ast.operator, other: Magnitude) -> Magnitude | None:
        """Of self + other, or as the operator says; None for other operators, and where there is no modest value."""
        divides = isinstance(operator, ast.Div | ast.FloorDiv | ast.Mod)
        if divides and other.value == 0:
            return None
        if self.value is not None and other.value is not None:
            return _exact(self.value, operator, other.value)
        match operator:
            case ast.Add() | ast.Sub():
                found = Magnitude(max(self.most, other.most) + 1, -_NO_LIMIT)
            case ast.Mult():
                found = Magnitude(_sum(self.most, other.most), _sum(self.least, other.least, -_NO_LIMIT))
            case ast.Div():
                found = Magnitude(_sum(self.most, -other.least), _sum(self.least, -other.most, -_NO_LIMIT))
            case ast.FloorDiv():
                found = Magnitude(max(_sum(self.most, -other.least), 0.0) + 1, -_NO_LIMIT)
            case ast.Mod():
                found = Magnitude(other.most, -_NO_LIMIT)
            case _:
                return None
        return found if found.most == _NO_LIMIT else found._modest()

    def power(self, exponent: Magnitude, size: float) -> Magnitude | None:
        """Of the power, `size` being a bound of the absolute exponent; None where there is no modest value."""
        by = exponent.value
        if by is None or (self.value == 0 and by < 0):
            return None
        if self.value is not None and by.denominator == 1:
            bits = self.value.numerator.bit_length() + self.value.denominator.bit_length()
            return None if bits * size > _MOST_BITS else Magnitude.of(self.value ** int(by))
        if self.value == 0:
            return Magnitude.of(0)
        ends = [_sum(bound * float(by), 0.0) if by else 0.0 for bound in (self.least, self.most)]
        found = Magnitude(max(ends), min(ends))
        if found.most == _NO_LIMIT:
            return found if size <= _MOST_UNBOUNDED else None
        return found._modest()

    def _modest(self) -> Magnitude | None:
        return self if self.most <= _MOST_BITS else None


def magnitude_of_call(function: str, argument: Magnitude) -> Magnitude | None:
    """Of a function's value; None where computing it could take long.

    The function is exp, sqrt, Abs, a logarithm, or one of the trigonometric and hyperbolic ones and their inverses.
    """
    if function in ("Abs", "abs"):
        value = argument.value
        return Magnitude(argument.most, argument.least, None if value is None else abs(value))
    if function == "sqrt":
        return Magnitude(argument.most / 2, argument.least / 2)
    if function in _LOGARITHMIC:
        known = [abs(bound) * math.log(2) for bound in (argument.most, argument.least) if math.isfinite(bound)]
        return Magnitude(math.log2(max(known, default=0.0) + _LEAST_LOGARITHM), -_NO_LIMIT)
    if argument.most > _GREATEST_ARGUMENT_BITS:
        return None
    if function in _WITH_POLES:
        return Magnitude(_NO_LIMIT, -_NO_LIMIT)
    assert function in _GROWING, function
    bits = 2.0**argument.most * math.log2(math.e) + 1
    return Magnitude(bits, -bits if function == "exp" else -_NO_LIMIT)


def _exact(one: Fraction, operator: ast.operator, other: Fraction) -> Magnitude | None:
    match operator:
        case ast.Add():
            return Magnitude.of(one + other)
        case ast.Sub():
            return Magnitude.of(one - other)
        case ast.Mult():
            return Magnitude.of(one * other)
        case ast.Div():
            return Magnitude.of(one / other)
        case ast.FloorDiv():
            return Magnitude.of(one // other)
        case ast.Mod():
            return Magnitude.of(one % other)
    return None


def _sum(one: float, other: float, unknown: float = _NO_LIMIT) -> float:
    """The sum of two bounds; `unknown` where they are infinite in opposite directions."""
    total = one + other
    return unknown if math.isnan(total) else total
