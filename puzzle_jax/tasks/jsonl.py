"""The user's own problems: a JSONL file with one prompt and its answer per line.

    {"prompt": "What is 6 * 7?", "answer": "42"}
    {"question": "Name a prime below 10.", "answer": "7", "match": "contains"}

`match` says when a final text is right. "exact" (the default): equal to the answer, surrounding white space aside, or
the same number, so that "1,000" and "1000.0" are one. "contains": the answer stands somewhere in the final text.
The file is read and checked as a whole before anything is asked. Left out: other formats, scripts that judge.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks.base import Problem

MATCHES = ("exact", "contains")

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?([eE][+-]?\d{1,4})?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """One line: what is asked, what is right, and when a text counts as that (one of `MATCHES`)."""

    prompt: str
    answer: str
    match: str = "exact"


@dataclass(frozen=True)
class JsonlTask:
    """The problems of one file; a problem's seed is its row. Make one with `JsonlTask.load(path)`."""

    name: str
    rows: tuple[Row, ...]

    @classmethod
    def load(cls, path: str | Path) -> JsonlTask:
        """Reads the file; blank lines are skipped.

        Raises:
          ConfigError: the file cannot be read or has no row, or a line is not of the form above; the message names
            file, line and field.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} cannot be read as a file of prompts and answers: {error}") from None
        rows = tuple(_row(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip())
        if not rows:
            raise ConfigError(f"{path} holds no row, but must hold at least one prompt with its answer")
        return cls(str(path), rows)

    @property
    def size(self) -> int:
        return len(self.rows)

    def sample(self, seed: int) -> Problem:
        """The problem of a row, counted from 0; raises `ConfigError` when there is no such row."""
        if not 0 <= seed < self.size:
            raise ConfigError(f"{self.name}: seed is {seed}, but must be a row from 0 to {self.size - 1}")
        row = self.rows[seed]
        return Problem(self.name, seed, row.prompt, row.answer, entry=row.match)

    def score(self, problem: Problem, final_text: str) -> float:
        text, answer = final_text.strip(), problem.answer.strip()
        if problem.entry == "contains":
            return float(answer in text)
        numbers = _number(text), _number(answer)
        return float(text == answer or (None not in numbers and numbers[0] == numbers[1]))


def _row(where: str, line: str) -> Row:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{where} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds a {type(value).__name__}, but must hold an object")
    if "prompt" in value and "question" in value:
        raise ConfigError(f"{where} has both prompt and question, but must have one of them")
    prompt = _text(where, value, "question" if "question" in value else "prompt")
    answer = _text(where, value, "answer")
    match = value.get("match", "exact")
    if match not in MATCHES:
        raise ConfigError(f"{where}: match is {match!r}, but must be one of {', '.join(MATCHES)}")
    return Row(prompt, answer, match)


def _text(where: str, value: dict[str, Any], field: str) -> str:
    if field not in value:
        raise ConfigError(f"{where} has no field {field}, which every row must have")
    text = value[field]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: {field} is {text!r}, but must be a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: {field} is {text!r}, but must be valid Unicode, without half a surrogate pair")
    return text


def _number(text: str) -> Decimal | None:
    """The number that the text writes, or None; commas may group thousands."""
    # At least one digit must stand before the exponent, which the pattern alone does not ask for.
    if not _NUMBER.fullmatch(text) or not text.lstrip("+-.")[:1].isdigit():
        return None
    return Decimal(text.replace(",", ""))
