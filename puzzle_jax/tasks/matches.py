"""Rules by which a final text is correct: as a text, as a number, or as a value that may be written in LaTeX.

    exact        the final text is the answer, surrounding white space aside, or as a whole is the same number
    contains     the answer occurs somewhere in the final text
    number       the whole text is the answer's number; currency, percent signs, emphasis and a final full stop aside
    last_number  the number in the last box or after the last `####`, else the last one in the text, is the answer's
    math         the value in the last box, after the last `####`, after "answer is" or "answer:", in the last formula,
                 or else of the whole text is the answer's

Numbers are compared exactly, as decimals: "1,000", "1000.0" and "1e3" are equal, "0.33" and "1/3" are not. Thousands
may be grouped by commas or narrow spaces, and the minus sign may be Unicode's. What has more than a thousand digits, or
an exponent of more than four, does not count as a number.

`math` also reads fractions (`3/4`, `\\frac{3}{4}`, `1\\frac{1}{2}`), powers of ten and percentages. Units
(`\\text{cm}`, degrees, currency) are dropped, as is the percent sign where only one side has it: 50% is 50 as well as
0.5. Lists, tuples and intervals are compared element by element; everything else as text, without purely visual LaTeX.
Left out: algebra (2x and x+x differ), tolerance, sets in another order.

Everything here takes time proportional to the length of the text, so that it needs no process of its own.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

MATCHES = ("exact", "contains", "number", "last_number", "math")

_LONGEST_VALUE = 1_000  # characters
_MOST_EXPONENT_DIGITS = 4
_DEEPEST = 8  # nesting of lists
_ALIKE = str.maketrans(
    {"\u2212": "-", "\ufe63": "-", "\uff0d": "-", "\uff0b": "+", "\uff0e": ".", "\uff0c": ",", "\uff05": "%"}
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
_CURRENCY = "$\u20ac\u00a3\u00a5"
_NARROW = "\u00a0\u2009\u202f"
_GROUPED = rf"\d{{1,3}}(?:[,{_NARROW}]\d{{3}})+(?!\d)"
_UNSIGNED = rf"(?:(?:{_GROUPED}|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(rf"[-+]?{_UNSIGNED}", re.ASCII)
_IN_TEXT = re.compile(rf"((?<![\w)\]}}%])[-+])?[{_CURRENCY}]?(?<!\w)({_UNSIGNED})", re.ASCII)
_WITH_SPACES = re.compile(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", re.ASCII)

_ANSWER_IS = re.compile(r"answer\s{0,9}(?:is\b|:|=)[ \t:]*([^\n]+)", re.IGNORECASE)
_LOOKS = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\[,;: ]|[$~]|\\\$")
_FRACTION_LIKE = re.compile(r"\\[dtc]frac")
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)")
_UNIT = re.compile(r"\\(?:text|textrm|textbf|mathrm|mathbf|operatorname|mbox)\s*\{([^{}]*)\}")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\u00b0|\\degree")
_SINGLE = re.compile(r"\{([A-Za-z0-9])\}")
_NAMED = re.compile(r"\s*[A-Za-z]\w{0,2}\s*=(?!=)")
_FRACTION = re.compile(r"([-+]?)(?:(\d+)\s*)?\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", re.ASCII)
_SLASH = re.compile(r"([-+]?)(?:(\d+) +)?([^\s/]+) ?/ ?([^\s/]+)", re.ASCII)
_SCIENTIFIC = re.compile(r"(.+?)\s*(?:\\times|\\cdot|\u00d7|\*|x)\s*10\s*\^\s*\{?([-+]?\d{1,4})\}?", re.ASCII)
_POWER_OF_TEN = re.compile(r"([-+]?)10\s*\^\s*\{?([-+]?\d{1,4})\}?", re.ASCII)
_WORKED = re.compile(r"####[ \t]*(\S[^\n]*)\s*\Z")
_BOX = "\\boxed"
_OPENING, _CLOSING = "([{", ")]}"


def is_right(match: str, answer: str, text: str) -> bool:
    """Returns whether a final text is correct by the rule `match`, one of `MATCHES`."""
    text, answer = text.strip(), answer.strip()
    if match == "contains":
        return answer in text
    if match == "exact":
        return text == answer or _equal(_number(text), _number(answer))
    if match == "number":
        return _equal(number(text), number(answer))
    if match == "last_number":
        return _equal(last_number(text), number(answer))
    return same_value(_stated(text), answer)


def number(text: str) -> Decimal | None:
    """The number that the whole text represents, or None."""
    text = text.translate(_ALIKE).strip().rstrip(".").strip("*_ ")
    for opening, closing in ((f"{_BOX}{{", "}"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
            text = text[len(opening) : -len(closing)].strip()
    text = text.rstrip(".").replace("{,}", ",").replace("\\%", "%").replace("\\$", "$").removesuffix("%").strip()
    sign = text[:1] if text[:1] in "+-" else ""
    text = sign + text.removeprefix(sign).strip(_CURRENCY).strip()
    return _number(text.replace(" ", "") if _WITH_SPACES.fullmatch(text) else text)


def last_number(text: str) -> Decimal | None:
    """The number in the last box of the text, or after its last `####`, else its last number; None if there is none."""
    marked = _marked(text)
    text = (text if marked is None else marked).translate(_ALIKE).replace("{,}", ",")
    if marked is not None and (whole := number(text)) is not None:
        return whole
    found = list(_IN_TEXT.finditer(text))
    return _number((found[-1][1] or "") + found[-1][2]) if found else None


def same_value(text: str, answer: str) -> bool:
    """Returns whether two texts represent the same value by the rule `math`."""
    if text == answer:
        return True
    if max(len(text), len(answer)) > _LONGEST_VALUE:
        return False
    return _same(_tidy(text), _tidy(answer))


def worked_answer(text: str) -> tuple[str, str] | None:
    """The final answer of a written-out solution and the rule that compares it; None if the text is no solution.

    A solution ends in a line `#### NUMBER`, as in GSM8K, or contains `\\boxed{...}`, as in MATH.
    """
    found = _WORKED.search(text)
    if found and number(found[1]) is not None:
        return found[1].strip(), "last_number"
    boxed = _boxed(text)
    return None if boxed is None else (boxed, "math")


def only_boxed(text: str) -> bool:
    """Returns whether the text is a box and nothing else."""
    boxed = _boxed(text)
    return boxed is not None and text.strip() == f"{_BOX}{{{boxed}}}"


def _equal(one: Decimal | None, other: Decimal | None) -> bool:
    return one is not None and one == other


def _number(text: str) -> Decimal | None:
    """The number that a text of digits, signs and separators represents; None for other texts."""
    text = text.translate(_ALIKE)
    if not _NUMBER.fullmatch(text):
        return None
    digits, _, exponent = re.sub(f"[,{_NARROW}]", "", text).lower().partition("e")
    if len(digits) > _LONGEST_VALUE or len(exponent.lstrip("+-").lstrip("0")) > _MOST_EXPONENT_DIGITS:
        return None
    return Decimal(f"{digits}e{int(exponent or 0)}")


def _marked(text: str) -> str | None:
    """The answer that a box or `####` marks in the text; None without one."""
    boxed = _boxed(text)
    if boxed is not None:
        return boxed
    _, found, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if found else None


def _boxed(text: str) -> str | None:
    """The content of the last box; None if there is none or it is not closed."""
    start = text.rfind(_BOX)
    if start < 0:
        return None
    opening = start + len(_BOX)
    while opening < len(text) and text[opening] == " ":
        opening += 1
    if text[opening : opening + 1] != "{":
        return None
    depth = 0
    for position in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if not depth:
            return text[opening + 1 : position].strip()
    return None


def _stated(text: str) -> str:
    """The part of the text that is presented as its answer."""
    marked = _marked(text)
    if marked is not None:
        return marked
    found = list(_ANSWER_IS.finditer(text))
    text = found[-1][1] if found else text
    text = text.strip().strip("*_").strip()
    pieces = text.split("$")
    if len(pieces) >= 3:
        return pieces[-2 if len(pieces) % 2 else -3]
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]")):
        end = text.rfind(closing)
        start = text.rfind(opening, 0, max(end, 0))
        if start >= 0:
            return text[start + len(opening) : end]
    return text


def _tidy(text: str) -> str:
    """The text without units and purely visual LaTeX."""
    text = text.translate(_ALIKE).replace("\\!", "").replace("{,}", ",").replace("\\%", "%")
    text = _LOOKS.sub(" ", text)
    text = _DEGREES.sub("", _FRACTION_LIKE.sub(r"\\frac", text))
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    without_units = _UNIT.sub("", text)
    text = without_units if without_units.strip() else _UNIT.sub(r"\1", text)
    text = text.strip().strip(_CURRENCY).rstrip(".").strip()
    return _NAMED.sub("", text, count=1).strip() if _NAMED.match(text) else text


def _same(one: str, other: str, depth: int = 0) -> bool:
    value, other_value = _value(one), _value(other)
    if value is not None and other_value is not None:
        (first, first_percent), (second, second_percent) = value, other_value
        if first == second:
            return True
        if first_percent == second_percent:
            return False
        return first == second / 100 if second_percent else first / 100 == second
    if _bare(one) == _bare(other) or depth == _DEEPEST:
        return _bare(one) == _bare(other)
    parts = _elements(one), _elements(other)
    return len(parts[0]) == len(parts[1]) > 1 and all(_same(*pair, depth + 1) for pair in zip(*parts, strict=True))


def _value(text: str) -> tuple[Fraction, bool] | None:
    """The number that a tidied text represents, and whether it is a percentage."""
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    if found := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
        sign, whole, above, below = found.groups()
        parts = [_number(part.strip()) for part in (whole or "0", above, below)]
        if None in parts or not parts[2]:
            return None
        first, second, third = (Fraction(part) for part in parts if part is not None)
        value = first + second / third
        return (-value if sign == "-" else value), percent
    if found := _POWER_OF_TEN.fullmatch(text):
        value = Fraction(10) ** int(found[2])
        return (-value if found[1] == "-" else value), percent
    if found := _SCIENTIFIC.fullmatch(text):
        factor = _number(found[1].strip())
        return None if factor is None else (Fraction(factor) * Fraction(10) ** int(found[2]), percent)
    whole_number = _number(text.replace(" ", "") if _WITH_SPACES.fullmatch(text) else text)
    return None if whole_number is None else (Fraction(whole_number), percent)


def _bare(text: str) -> str:
    """The text, normalised for comparison as text."""
    return _SINGLE.sub(r"\1", re.sub(r"\s+", "", text))


def _elements(text: str) -> list[str]:
    """Parts between top-level commas, preceded by enclosing brackets; one part where brackets do not balance."""
    text = text.strip()
    brackets = []
    if len(text) > 1 and text[0] in _OPENING and text[-1] in _CLOSING:
        brackets, text = [f"\0{text[0]}{text[-1]}"], text[1:-1]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in _OPENING) - (character in _CLOSING)
        if depth < 0:
            return [text]
        if character == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*brackets, *parts, text[start:].strip()]
