"""Whether a model's text may be handed to code that would run it: a plain value, or a formula of modest size.

Some scorers from outside call `eval`, or sympy's parser, which does, on what a model wrote. Here the text is only
parsed, never run; a scorer sees it when nothing in it can do more than compute a value, and that soon. The price:
a right answer in a form beyond these is not recognised.
"""

from __future__ import annotations

import ast
import re

LONGEST = 20_000
"""Characters of a text that a scorer may see."""

_LONGEST_EXPRESSION = 1_000
_GREATEST_EXPONENT = 100
_FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "abs",
})  # fmt: skip
_CONSTANTS = frozenset({"pi", "E"})
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd)

_LONG_COUNT = re.compile(r"[A-Za-z]'?[+-]?\d[\d_]{3}|(?<![a-z])nan(?![a-ik-z])", re.IGNORECASE)


def is_literal(text: str) -> bool:
    """Whether the text is a Python value: numbers, strings, lists, tuples and the like, nothing computed."""
    if len(text) > LONGEST:
        return False
    try:
        ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def is_expression(text: str) -> bool:
    """Whether the text is a formula of numbers, one-letter symbols, well-known functions and + - * / // % **.

    Powers of a symbol, of a number up to 100 or of a fraction of such; powers in one another multiply their
    exponents, and the product must not exceed 100 either.
    """
    if len(text) > _LONGEST_EXPRESSION:
        return False
    try:
        return _is_formula(ast.parse(text.strip(), mode="eval").body, 1.0)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def is_brief(text: str) -> bool:
    """Whether the text has no exponent or count of four digits (`1e9999`, `U9999`, `A+9999`) that would take a scorer
    long, and no `nan`, which compares with nothing."""
    return len(text) <= LONGEST and not _LONG_COUNT.search(text)


def _is_formula(node: ast.expr, power: float) -> bool:
    """Whether the node is a formula that stays modest when raised to `power`."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return not isinstance(value, bool) and abs(value) < 1e12
        case ast.Name(id=name):
            return len(name) == 1 or name in _CONSTANTS
        case ast.UnaryOp(op=op, operand=operand):
            return isinstance(op, _OPERATORS) and _is_formula(operand, power)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]):
            return name in _FUNCTIONS and _is_formula(argument, power)
        case ast.BinOp(left=base, op=ast.Pow(), right=ast.Name(id=name)):
            return len(name) == 1 and _is_formula(base, power)
        case ast.BinOp(left=base, op=ast.Pow(), right=exponent):
            size = _size(exponent)
            return size is not None and power * size <= _GREATEST_EXPONENT and _is_formula(base, power * max(size, 1.0))
        case ast.BinOp(left=left, op=op, right=right):
            return isinstance(op, _OPERATORS) and _is_formula(left, power) and _is_formula(right, power)
    return False


def _size(exponent: ast.expr) -> float | None:
    """Absolute value of a number, a negative number, or a fraction of numbers (then the numerator's); else None."""
    match exponent:
        case ast.Constant(value=int() | float() as value):
            return float(abs(value))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _size(operand)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            above, below = _size(left), _size(right)
            return None if above is None or below is None else max(above, below)
    return None
