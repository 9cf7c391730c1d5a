"""Checks whether a model's text may be passed to code that executes it: a plain value, or a formula of modest size.

Some third-party scorers call `eval` on what a model wrote, directly or through sympy's parser. Here the text is only
parsed, never executed; a scorer gets it only if it can do nothing but compute a value, and quickly. The price is that
a correct answer in any other form is not recognised.

The size of a formula's value is bounded before sympy computes it. Numbers without functions are computed exactly, as
long as they are modest (`magnitudes`). Everything else is bounded from above, every symbol counting as 1 since symbols
may cancel, and from below where that is possible, as for products. So the arguments of functions are known to be
modest: sin(exp(999999999)) would take sympy longer than anyone waits, and int(exp(99999)) all memory. The number of
terms of the multiplied-out formula is bounded too, since sympy multiplies formulas out to compare them.
"""

from __future__ import annotations

import ast
import math
import re

from puzzle_jax.tasks.magnitudes import Magnitude, magnitude_of_call

LONGEST = 20_000
"""Most characters of a text that is passed to a scorer."""

_LONGEST_EXPRESSION = 1_000
_GREATEST_EXPONENT = 100
_MOST_TERMS = 100
_FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "abs",
})  # fmt: skip
_CONSTANTS = frozenset({"pi", "E"})
_CONSTANT = Magnitude(2.0, 1.0)  # both are between 2 and 4
_LONGEST_NUMBER = 40
_LONG_NUMBER = re.compile(rf"[\d_.]{{{_LONGEST_NUMBER + 1}}}|[eE][+-]?[\d_]{{3}}")
"""Numbers that sympy would read exactly although Python cannot represent them (1e-99999)."""

_LONG_COUNT = re.compile(r"[A-Za-z]'?[+-]?\d[\d_]{3}|(?<![a-z])nan(?![a-ik-z])", re.IGNORECASE)


def is_literal(text: str) -> bool:
    """Returns whether the text is a Python value: numbers, strings, lists, tuples and the like, nothing computed."""
    if len(text) > LONGEST:
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def is_expression(text: str) -> bool:
    """Returns whether the text is a formula of numbers, one-letter symbols, well-known functions and + - * / // % **.

    An exponent is a symbol, a number up to 100, or a fraction of such numbers; nested powers multiply their exponents,
    and the product must not exceed 100 either. Arguments of functions must not exceed 1000, whole numbers 20,000 bits,
    and the formula 100 terms when it is multiplied out. A formula that divides by 0 has no value and is refused.
    """
    if len(text) > _LONGEST_EXPRESSION or _LONG_NUMBER.search(text):
        return False
    try:
        formula = ast.parse(text.strip(), mode="eval").body
        return _magnitude(formula, 1.0) is not None and _terms(formula) <= _MOST_TERMS
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def is_brief(text: str) -> bool:
    """Returns whether the text has no exponent or count of four digits (`1e9999`, `U9999`, `A+9999`), over which a
    scorer takes long, and no `nan`, which fails every comparison."""
    return len(text) <= LONGEST and not _LONG_COUNT.search(text)


def _magnitude(node: ast.expr, power: float) -> Magnitude | None:
    """The size of a formula that stays modest when raised to `power`; None for anything else."""
    match node:
        case ast.Constant(value=int() | float() as value):
            modest = not isinstance(value, bool) and abs(value) < 1e12
            return Magnitude.of(value) if modest else None
        case ast.Name(id=name):
            if name in _CONSTANTS:
                return _CONSTANT
            return Magnitude(0.0, 0.0) if len(name) == 1 else None
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            inner = _magnitude(operand, power)
            return -inner if inner is not None and isinstance(op, ast.USub) else inner
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _FUNCTIONS:
            inner = _magnitude(argument, power)
            return None if inner is None else magnitude_of_call(name, inner)
        case ast.BinOp(left=base, op=ast.Pow(), right=ast.Name(id=name)):
            inner = _magnitude(base, power)
            return inner.without_value() if inner is not None and len(name) == 1 else None
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            size = _size(exponent)
            if size is None or power * size > _GREATEST_EXPONENT:
                return None
            inner, by = _magnitude(base, power * max(size, 1.0)), _magnitude(exponent, 1.0)
            return None if inner is None or by is None else inner.power(by, size)
        case ast.BinOp(left=left, op=op, right=right):
            one, other = _magnitude(left, power), _magnitude(right, power)
            return None if one is None or other is None else one.combined(op, other)
    return None


def _terms(node: ast.expr) -> float:
    """The most terms that a formula can have when it is multiplied out, arguments of functions included."""
    match node:
        case ast.UnaryOp(operand=operand):
            return _terms(operand)
        case ast.Call(args=[argument]):
            return _terms(argument)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
            return _terms(left) + _terms(right)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            times, terms = math.ceil(_size(exponent) or 1.0), _terms(base)
            if isinstance(base, ast.Call):
                terms += 1  # sin(x)**2 may become a sum
            # Ways to choose `times` of the terms, with repetition and in any order.
            return float(math.comb(times + int(terms) - 1, times)) if terms <= _MOST_TERMS else math.inf
        case ast.BinOp(left=left, right=right):
            return _terms(left) * _terms(right)
    return 1.0


def _size(exponent: ast.expr) -> float | None:
    """Absolute value of a number, a negative number, or a fraction of numbers (the larger of the two); else None."""
    match exponent:
        case ast.Constant(value=int() | float() as value):
            return float(abs(value))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _size(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            above, below = _size(left), _size(right)
            return None if above is None or below is None else max(above, below)
    return None
