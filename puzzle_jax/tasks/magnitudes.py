"""Upper and lower bounds of a formula's value, found without computing what may be too large to compute.

A `Magnitude` bounds |value| by 2^least and 2^most, and holds the value itself where it is a modest fraction. Sums can
cancel, so they have no lower bound; a quotient by a sum is unbounded, and is refused as an argument of functions that
grow. Symbols count as 1.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

_MOST_BITS = 20_000  # limit for exact numbers and for all others
_ROUNDING = 1e-6  # error of logarithms
_GREATEST_ARGUMENT_BITS = math.log2(1000) + _ROUNDING
_LEAST_LOGARITHM = 1000.0  # covers poles: atan of what floats cannot tell from i is 19
_MOST_UNBOUNDED = 10  # largest power of what has no bound, such as tan(x)**3
_NO_LIMIT = math.inf

_GROWING = frozenset({"exp", "sinh", "cosh", "sin", "cos"})  # the last two along the imaginary axis
_WITH_POLES = frozenset({"tan", "sec", "csc", "cot", "tanh"})
_LOGARITHMIC = frozenset({"log", "ln", "asin", "acos", "atan", "asinh", "acosh", "atanh"})


_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Magnitude:
    """The size of a number.

    Attributes:
      most, least: base-2 logarithms of bounds of the absolute value, infinite where there is none, with every symbol
        taken as 1.
      value: the number itself, if it is a known fraction.
    """

    most: float
    least: float
    value: Fraction | None = None

    @staticmethod
    def of(value: int | float | Fraction) -> Magnitude | None:
        """The magnitude of a number; None if it has too many digits."""
        exact = Fraction(value)
        if exact.numerator.bit_length() + exact.denominator.bit_length() > _MOST_BITS:
            return None
        if not exact:
            return Magnitude(-_NO_LIMIT, -_NO_LIMIT, exact)
        about = math.log2(abs(exact.numerator)) - math.log2(exact.denominator)
        return Magnitude(about + _ROUNDING, about - _ROUNDING, exact)

    def without_value(self) -> Magnitude:
        """The same bounds without the value."""
        return Magnitude(self.most, self.least)

    def __neg__(self) -> Magnitude:
        return Magnitude(self.most, self.least, None if self.value is None else -self.value)

    def combined(self, by: ast.operator, other: Magnitude) -> Magnitude | None:
        """The magnitude of self + other, or of another operator's result; None if it is not modest."""
        divides = isinstance(by, ast.Div | ast.FloorDiv | ast.Mod)
        if divides and other.value == 0:
            return None
        if self.value is not None and other.value is not None:
            return _exact(self.value, by, other.value)
        match by:
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
        """The magnitude of the power, `size` being a bound of the absolute exponent; None if it is not modest."""
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
    """The magnitude of a function's value; None if computing it could take long.

    The function is exp, sqrt, Abs, a logarithm, or a trigonometric or hyperbolic function or its inverse.
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


def _exact(one: Fraction, by: ast.operator, other: Fraction) -> Magnitude | None:
    compute = _OPERATORS.get(type(by))
    return None if compute is None else Magnitude.of(compute(one, other))


def _sum(one: float, other: float, unknown: float = _NO_LIMIT) -> float:
    """The sum of two bounds; `unknown` where they are infinite in opposite directions."""
    total = one + other
    return unknown if math.isnan(total) else total
