"""When a text counts as correct: tables of what people write, and numbers and fractions against Python's own."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.tasks.matches import MATCHES, is_right, last_number, number, worked_answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", "42"),
        (" -42.0\n", "-42"),
        ("\u221242", "-42"),
        ("1,234,567.50", "1234567.5"),
        ("1\u202f234", "1234"),
        ("1 234", "1234"),
        ("$18", "18"),
        ("-$1,000", "-1000"),
        ("18 \u20ac", "18"),
        ("50%", "50"),
        ("50\\%", "50"),
        ("**7**.", "7"),
        ("$7$", "7"),
        ("\\boxed{7}", "7"),
        ("\\(1{,}000\\)", "1000"),
        ("6.02e23", "6.02e23"),
        ("1E-7", "1e-7"),
        (".5", "0.5"),
        ("1e9999", "1e9999"),
        ("\uff14\uff12", "42"),
    ],
)
def test_what_a_number_is(text, value):
    assert number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        ".",
        "e5",
        "10,00",
        "1,2345",
        "1.2.3",
        "0x10",
        "nan",
        "inf",
        "1e10000",
        "9" * 1001,
        "1_000",
        "4 pens",
        "1/2",
    ],
)
def test_what_no_number_is(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 pens cost 3 * 4 = 12 coins.", "12"),
        ("It is 12.", "12"),
        ("10-3=7", "7"),
        ("10-3", "3"),
        ("x = -3", "-3"),
        ("about -$4.50!", "-4.5"),
        ("From 1,000 to 2,500 in H2O", "2500"),
        ("12\n#### 7\nChecked 3 times.", "7"),
        ("\\boxed{5} after 9 steps", "5"),
        ("none", None),
        ("1e99999", None),
    ],
)
def test_the_last_number(text, value):
    found = last_number(text)
    assert found == (None if value is None else Decimal(value))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("\\frac{1}{2}", "0.5"),
        ("\\frac12", "\\dfrac{1}{2}"),
        ("1/2", "The answer is $\\tfrac{2}{4}$."),
        ("-\\frac{3}{4}", "-3/4"),
        ("1\\frac{1}{2}", "3/2"),
        ("1 1/2", "1.5"),
        ("50\\%", "0.5"),
        ("50%", "50"),
        ("0.5", "50%"),
        ("1000", "So $x = 1{,}000$"),
        ("1000", "10^3"),
        ("1.5e5", "1.5 \\times 10^{5}"),
        ("5", "x = 5"),
        ("5\\text{ cm}", "5"),
        ("90^\\circ", "90"),
        ("\\text{Yes}", "Yes"),
        ("(1, 2)", "\\left(1,\\, 2.0\\right)"),
        ("[0, 1)", "\\boxed{[0,1)}"),
        ("x^2+1", "$x^{2} + 1$"),
        ("\\sqrt{2}", "\\sqrt2"),
        ("4", "First 3, then **answer: 4**"),
        ("4", "3\n#### 4"),
        ("2\\pi", "\\[2 \\pi\\]"),
    ],
)
def test_equal_values(answer, text):
    assert is_right("math", answer, text)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("1/2", "1/3"),
        ("1/2", "1/0"),
        ("1/3", "0.33"),
        ("50%", "5%"),
        ("50", "0.5"),
        ("4", "The answer is 5, not 4"),
        ("4", "\\boxed{5} 4"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(1,2,3)"),
        ("2x", "x+x"),
        ("4", ""),
        ("4", "\\boxed{4"),
    ],
)
def test_other_values(answer, text):
    assert not is_right("math", answer, text)


@given(st.fractions(max_denominator=10**6), st.integers(1, 50))
def test_fractions_are_equal_however_they_are_written(value, factor):
    above, below = value.numerator * factor, value.denominator * factor
    written = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert is_right("math", written, f"{above}/{below}") and is_right("math", f"{above:,}/{below:,}", written)
    assert not is_right("math", written, f"{above + 1}/{below}")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=4), st.sampled_from(["number", "last_number", "math"]))
def test_decimals_are_read_as_python_reads_them(value, match):
    assert is_right(match, str(value), f"{value:f}") and is_right(match, f"{value:,f}", f"{value:e}")
    assert not is_right(match, str(value), f"{value + 1:f}")
    assert Fraction(value) == Fraction(number(f"{value:,f}") or 0)


@given(st.text(alphabet="0123456789,.-+e$%()[]{}\\ abx#\nboxedfrac", max_size=200), st.sampled_from(MATCHES))
def test_any_text_is_judged(text, match):
    assert is_right(match, "12", text) in (True, False)
    worked_answer(text)


@pytest.mark.parametrize(
    "piece", ["1,", "((", "1", "-$", "\\(", "$ ", "{", "answer is ", "\\boxed{", "1e", "\\frac{1}", "#### "]
)
def test_long_texts_take_no_long_time(piece):
    """Each would take minutes rather than milliseconds if the time were quadratic in the length."""
    text = piece * (2_000_000 // len(piece))
    for match in MATCHES:
        assert is_right(match, "12", text) in (True, False)
