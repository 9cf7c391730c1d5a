"""The family `ledger`: follow one account through a long list of changes to many.

A change is the account's letter, the number of the change to this account, an operator, and a digit. Changes of several
accounts are scattered in filler; the question names an account and one of its changes. The answer is the balance after
that change, which starts at 0 and is kept modulo 10. Unlike in `recall`, what is read has to be combined in order, and
the steps lie at distances that grow with the length of the list, up to several hundred tokens.
Left out: transfers between accounts, balances of more than one digit.
"""

from __future__ import annotations

import math
import random
import re
import string
from dataclasses import dataclass

from puzzle_jax.errors import check_range
from puzzle_jax.tasks.arithmetic import OPERATORS
from puzzle_jax.tasks.base import Embedded, Problem, Slip, Work, check_effort, draw_level, no_slip
from puzzle_jax.tasks.recall import scatter

_SHARE_OF_CHANGES = 0.5  # of the characters of the longest possible list of changes; the rest is filler
_CHANGE = 5  # characters of a change and the space after it


@dataclass(frozen=True)
class Ledger(Embedded):
    """`A1+3 ko B1+2 A2-4 demu B2-5 ?A2`: the balance of account A after its second change, modulo 10.

    High effort writes `A1+3=3`, `A2-4=9` (change copied, balance), medium `1=3`, `2=9` (number of the change, balance),
    low nothing. The details are the number of `changes` that lead to the answer, and the `distance` in characters
    (tokens of the embedded parents) from the first of them to the question mark.
    """

    max_changes: int = 9
    max_length: int = 800
    name: str = "ledger"

    def __post_init__(self) -> None:
        self.check("changes", 1, self.max_changes)
        check_range(f"{self.name}: max_changes", self.max_changes, 1, 9)  # the number of a change is one digit
        check_range(f"{self.name}: max_length", self.max_length, 64)

    @property
    def level(self) -> str:
        return "changes"

    def sample(self, seed: int) -> Problem:
        rng = random.Random(f"{self.name}:{seed}")
        # Lengths are log-uniform, so that near and far changes are equally common.
        length = round(math.exp(rng.uniform(math.log(24), math.log(self.max_length))))
        most = max(1, int(_SHARE_OF_CHANGES * length) // _CHANGE)
        asked, *others = rng.sample(string.ascii_uppercase, min(len(string.ascii_uppercase), 1 + most // 4))
        changes = min(draw_level(rng, 1, self.max_changes), most)
        after = rng.randint(0, min(self.max_changes, most) - changes)
        accounts = [asked] * (changes + after)
        for account in others:
            accounts += [account] * min(rng.randint(1, self.max_changes), max(most - len(accounts), 0))
        rng.shuffle(accounts)
        numbers: dict[str, int] = {}
        entries = []
        for account in accounts:
            numbers[account] = numbers.get(account, 0) + 1
            entries.append(f"{account}{numbers[account]}{rng.choice('+-')}{rng.randrange(10)}")
        text = scatter(entries, length, rng)
        prompt = f"{text}?{asked}{changes}"
        details = {"changes": changes, "distance": len(text) - text.index(f"{asked}1")}
        return Problem(self.name, seed, prompt, str(_balances(prompt)[-1][-1]), details)

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        if check_effort(effort) == "low":
            return Work((), problem.answer)
        found = _balances(problem.prompt, slip)
        if effort == "medium":
            steps = [f"{number}={balance}" for number, (_, balance) in enumerate(found, start=1)]
        else:
            steps = [f"{change}={balance}" for change, balance in found]
        return Work(tuple(steps), str(found[-1][-1]))


def _balances(prompt: str, slip: Slip = no_slip) -> list[tuple[str, int]]:
    """Each change that leads to the answer, as it is written in the prompt, with the balance after it."""
    text, (account, changes) = prompt.split("?")
    balance, found = 0, []
    for change, operator, digit in re.findall(rf"({account}\d([-+])(\d))", text)[: int(changes)]:
        result = OPERATORS[operator](balance, int(digit))
        balance = slip(f"{balance}{operator}{digit}", result) % 10
        found.append((change, balance))
    return found
