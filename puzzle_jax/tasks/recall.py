"""The family `recall`: look up entries of a long list, near and far, and add them.

Entries (a capital letter and its digit) are scattered in filler; the question at the end asks for some of the
letters. The answer is the sum of their digits modulo 10, so that a single wrong look-up shows. This is the
family that needs full attention: a window of 16 tokens in every layer cannot see an entry 500 tokens back.
Left out: entries that change their value, values of more than one digit.
"""

from __future__ import annotations

import math
import random
import re
import string
from dataclasses import dataclass

from puzzle_jax.errors import check_range
from puzzle_jax.tasks.base import Embedded, Problem, Slip, Work, check_effort, draw_level, no_slip

_KEYS = string.ascii_uppercase
# Two-letter syllables, which cannot form a word that the embedded tokenizer holds as one token,
# so that every character is a token and distances are exact.
_FILLER = ("ba", "de", "fi", "ko", "mu", "na", "pe", "ri", "so", "tu", "va", "ze")

DISTANCE_BUCKETS: tuple[tuple[str, int, int], ...] = (
    ("within 16", 0, 16),
    ("within 64", 17, 64),
    ("beyond 64", 65, 1 << 30),
)
"""Ranges (label, least, greatest) of details["distance"] by which accuracy is reported."""


@dataclass(frozen=True)
class Recall(Embedded):
    """`A7 ko B2 demu Q5 ?QA`: the digits of the asked letters, summed modulo 10.

    High effort writes `Q5=5`, `A7=2` (entry copied, running sum), medium `Q5A2` (letter, running sum), low nothing.
    The details are the number of `asked` letters and of `entries` in the list, and the `distance` in characters (tokens
    of the embedded parent) from the farthest asked entry to the question mark.
    """

    max_asked: int = 5
    max_length: int = 352
    name: str = "recall"

    def __post_init__(self) -> None:
        self.check("asked", 1, self.max_asked)
        check_range(f"{self.name}: max_asked", self.max_asked, 1, len(_KEYS))
        check_range(f"{self.name}: max_length", self.max_length, 32)

    @property
    def level(self) -> str:
        return "asked"

    def sample(self, seed: int) -> Problem:
        rng = random.Random(f"{self.name}:{seed}")
        # Lengths are log-uniform, so that near, middle and far entries are equally common.
        length = round(math.exp(rng.uniform(math.log(12), math.log(self.max_length))))
        most = min(len(_KEYS), max(1, length // 4))
        entries = rng.randint(min(most, 2), most)
        keys = rng.sample(_KEYS, entries)
        values = {key: rng.randrange(10) for key in keys}
        asked = rng.sample(keys, min(draw_level(rng, 1, self.max_asked), entries))
        text = scatter([f"{key}{values[key]}" for key in keys], length, rng)
        answer = sum(values[key] for key in asked) % 10
        distance = max(len(text) - text.index(key) for key in asked)
        details = {"asked": len(asked), "entries": entries, "distance": distance}
        return Problem(self.name, seed, f"{text}?{''.join(asked)}", str(answer), details)

    def work(self, problem: Problem, effort: str, slip: Slip = no_slip) -> Work:
        if check_effort(effort) == "low":
            return Work((), problem.answer)
        text, asked = problem.prompt.split("?")
        values = {key: int(digit) for key, digit in re.findall(r"([A-Z])(\d)", text)}
        total, steps = 0, []
        for key in asked:
            total = slip(f"{total}+{values[key]}", total + values[key]) % 10
            steps.append(f"{key}{total}" if effort == "medium" else f"{key}{values[key]}={total}")
        return Work(tuple(steps), str(total), separated=effort == "high")


def scatter(entries: list[str], length: int, rng: random.Random) -> str:
    """Returns the entries in order, each followed by a space, with filler words between them up to about `length`
    characters."""
    words = list(entries)
    room = length - sum(len(entry) + 1 for entry in entries)
    while room >= 3:
        word = "".join(rng.choice(_FILLER) for _ in range(rng.randint(1, 3)))[: room - 1]
        words.insert(rng.randint(0, len(words)), word)
        room -= len(word) + 1
    return " ".join(words) + " "
