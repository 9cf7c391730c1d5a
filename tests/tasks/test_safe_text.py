"""What may reach code that runs its input: values and formulas, no calls into Python and nothing that takes long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.tasks.safe_text import is_brief, is_expression, is_literal


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
