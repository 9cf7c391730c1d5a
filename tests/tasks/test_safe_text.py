"""Text that may reach code which evaluates it: values and formulas, but no Python calls and nothing slow."""

import ast
import cmath
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from puzzle_jax.tasks.safe_text import _magnitude, is_brief, is_expression, is_literal


@pytest.mark.parametrize("text", ["[1, 2]", "['a', 'b']", "((1, 2), -3.5)", "None", "{1: [2]}"])
def test_values_are_literals(text):
    assert is_literal(text)


@pytest.mark.parametrize("text", ["", "f()", "[x]", "1 + 1", "().__class__", "'a' * 9", "[1", "[" * 5000, "-" * 30000])
def test_all_else_is_no_literal(text):
    assert not is_literal(text)


@pytest.mark.parametrize(
    "text",
    [
        "3*(8 - 5)/9",
        "-x**2*cos(x)/3 + C",
        "5*x**7/7",
        "sqrt(x) + log(x**2 + 1)",
        "x**(3/2) - 2**x",
        "x**-1",
        "(x**2)**50",
        "exp(1000)",
        "sin(1000*x)",
        "exp(-5*x**2/2)*cos(3*x)",
        "tan(x)**3/3",
        "sqrt(999999999999**100)",
        "log(log(2))",
        "1/(sqrt(2) - 1)",
        "(x + 1)**20",
    ],
)
def test_formulas_are_expressions(text):
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "x.__class__",
        "open(x)",
        "factorial(9)",
        "5!",
        "[1, 2][0]",
        "lambda: 1",
        "'a'",
        "xy + 1",
        "sin(x, y)",
        "sin(x=1)",
        "x if x else y",
        "9**9**9",
        "9**101",
        "(9**99)**99",
        "9**(9*9*9)",
        "9**(101/1)",
        "10000000000000",
        "1e300",
        "True",
        "1 << 99999999",
        "x = 1",
        "",
        "(" * 500,
        "+".join("x" * 600),
        "sin(exp(999999999))",
        "exp(1001)",
        "exp(exp(7))",
        "exp(700)**50",
        "sin(999999999999)",
        "tan(99999/x)*sin(9999*x/x)",
        "sin(x*999999999/x)",
        "exp(1/(x - x + 1/999999999999))",
        "exp(1/(sqrt(2) - 1.414213562373))",
        "exp(99*log(exp(99*log(9))))",
        "*".join(["999999999999**100"] * 6),
        "(1/(sin(1)**2 + cos(1)**2 - 1))**99",
        "1e-99999",
        "1/0." + "0" * 400 + "1",
        "1/0",
        "1//(2 - 2)",
        "0**-1",
        "(x + 1)**100",
        "((x + 1)**10 + (y + 1)**10)**10",
        "sin(x)**100*cos(x)**100",
    ],
)
def test_programs_and_towers_are_no_expressions(text):
    assert not is_expression(text)


@given(st.integers(-(10**11), 10**11), st.integers(0, 100), st.sampled_from("+-*/"))
def test_arithmetic_of_modest_numbers_is_an_expression(a, b, operator):
    assert is_expression(f"{a} {operator} x**{b}")


@given(st.text())
def test_any_text_is_decided(text):
    for decide in (is_literal, is_expression, is_brief):
        assert decide(text) in (True, False)


@pytest.mark.parametrize("text", ["1e999", "0.3125", "R U' F2", "A+1 B-3", "banana", "3 + 4j", "123456"])
def test_short_counts_are_brief(text):
    assert is_brief(text)


@pytest.mark.parametrize(
    "text", ["1e9999", "1E-9_999", "U9999", "U'99999", "A+9999", "nan", "NaN+1j", "nanj", "1" * 20001]
)
def test_long_counts_are_not(text):
    assert not is_brief(text)


@given(
    st.recursive(
        st.sampled_from(["0", "1", "7", "0.5", "99999", "x", "y", "pi", "E"]),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/%"), inner).map(lambda parts: "({}{}{})".format(*parts)),
            st.tuples(st.sampled_from(["sqrt", "exp", "sin", "log", "atan"]), inner).map(lambda p: "{}({})".format(*p)),
            st.tuples(inner, st.sampled_from(["2", "(1/2)", "-1", "9"])).map(lambda parts: "({}**{})".format(*parts)),
        ),
        max_leaves=8,
    )
)
@example("atan((y**(1/2)))")
@example("log((1-0.99999999999999))")
def test_sizes_bound_what_python_computes(text):
    """Compared with Python's floats, with a number of absolute value 1 in place of each symbol."""
    size = _magnitude(ast.parse(text, mode="eval").body, 1.0)
    if size is None:
        return
    names = {"x": 1.0, "y": -1.0, "pi": math.pi, "E": math.e}
    functions = {"sqrt": cmath.sqrt, "exp": cmath.exp, "sin": cmath.sin, "log": cmath.log, "atan": cmath.atan}
    try:
        value = float(abs(eval(text, {"__builtins__": {}}, names | functions)))
    except (ZeroDivisionError, OverflowError, ValueError, TypeError):
        return
    if math.isfinite(value) and value > 1e-9:
        assert math.log2(value) <= size.most + 1e-5
        if size.least > -math.inf:
            assert math.log2(value) >= size.least - 1e-5
