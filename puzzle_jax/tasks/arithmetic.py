"""Two arithmetic families of the embedded parent: `chain` (operations modulo 10) and `add` (long addition).

Both are exact, unlimited in number, and hard without written steps. The efforts differ in how much a trace writes:
high copies the operands of every step, which a small model needs to get long problems right; medium writes results and
must find the operands itself; low writes nothing.
Left out: negative numbers, precedence (a chain is evaluated from left to right).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from puzzle_jax.tasks.base import Embedded, Problem, Slip, Work, check_effort, draw_level, no_slip

OPERATORS: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {
        "+": lambda a, b: (a + b) % 10,
        "-": lambda a, b: (a - b) % 10,
        "*": lambda a, b: (a * b) % 10,
    }
)
"""Operations modulo 10 by their sign."""


@dataclass(frozen=True)
class Chain(Embedded):
    """`mod 7+5*3-2`: digits joined by + - *, evaluated from left to right modulo 10; the answer is one digit.

    High effort writes `7+5=2`, `*3=6`, `-2=4`, medium `+2*6-4` (operator, result), low nothing.
    """

    min_steps: int = 1
    max_steps: int = 10
    name: str = "chain"

    def __post_init__(self) -> None:
        self.check("steps", self.min_steps, self.max_steps)

    @property
    def level(self) -> str:
        return "steps"

    def sample(self, seed: int) -> Problem:
        rng = random.Random(f"{self.name}:{seed}")
        steps = draw_level(rng, self.min_steps, self.max_steps)
        text = str(rng.randrange(10))
        for _ in range(steps):
            text += rng.choice("+-*") + str(rng.randrange(10))
        values = _running_values(text)
        return Problem(self.name, seed, f"mod {text}", str(values[-1]), {"steps": steps})

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        check_effort(effort)
        text = problem.prompt.removeprefix("mod ")
        values = _running_values(text, no_slip if effort == "low" else slip)
        if effort == "low":
            return Work((), str(values[-1]))
        if effort == "medium":
            steps = [f"{text[2 * i + 1]}{value}" for i, value in enumerate(values)]
            return Work(tuple(steps), str(values[-1]), separated=False)
        steps = [f"{text[2 * i + 1 : 2 * i + 3]}={value}" for i, value in enumerate(values)]
        steps[0] = text[0] + steps[0]
        return Work(tuple(steps), str(values[-1]))


def _running_values(text: str, slip: Slip = no_slip) -> list[int]:
    """The value after each operation of `7+5*3-2`."""
    value, values = int(text[0]), []
    for position in range(1, len(text), 2):
        operator, operand = text[position : position + 2]
        value = slip(f"{value}{operator}{operand}", OPERATORS[operator](value, int(operand))) % 10
        values.append(value)
    return values


@dataclass(frozen=True)
class Add(Embedded):
    """`add 345+678`: two numbers of equal length; the answer is their sum.

    From the last digit to the first, high effort writes `5+8+0=13`, `4+7+1=12`, `3+6+1=10` (digits, carry in, column
    sum), medium `583`, `472`, `360` (digits, last digit of their sum), low nothing.
    """

    min_digits: int = 1
    max_digits: int = 6
    name: str = "add"

    def __post_init__(self) -> None:
        self.check("digits", self.min_digits, self.max_digits)

    @property
    def level(self) -> str:
        return "digits"

    def sample(self, seed: int) -> Problem:
        rng = random.Random(f"{self.name}:{seed}")
        digits = draw_level(rng, self.min_digits, self.max_digits)
        first, second = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        carries = sum(total >= 10 for _, _, _, total in _columns(str(first), str(second)))
        details = {"digits": digits, "carries": carries}
        return Problem(self.name, seed, f"add {first}+{second}", str(first + second), details)

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        check_effort(effort)
        if effort == "low":
            return Work((), problem.answer)
        first, second = problem.prompt.removeprefix("add ").split("+")
        columns = _columns(first, second, slip)
        if effort == "medium":
            steps = [f"{a}{b}{total % 10}" for a, b, _, total in columns]
        else:
            steps = [f"{a}+{b}+{carry}={total}" for a, b, carry, total in columns]
        answer = str(columns[-1][-1]) + "".join(str(total % 10) for *_, total in reversed(columns[:-1]))
        return Work(tuple(steps), answer)


def _columns(first: str, second: str, slip: Slip = no_slip) -> list[tuple[int, int, int, int]]:
    """(digit, digit, carry in, column sum) from the last digit to the first."""
    columns, carry = [], 0
    for a, b in zip(reversed(first), reversed(second), strict=True):
        total = min(max(slip(f"{a}+{b}+{carry}", int(a) + int(b) + carry), 0), 19)
        columns.append((int(a), int(b), carry, total))
        carry = total // 10
    return columns
