"""The user's own problems: a JSONL file with one prompt and its answer per line.

    {"prompt": "What is 6 * 7?", "answer": "42"}
    {"question": "Name a prime below 10.", "answer": "7", "match": "contains"}
    {"question": "3 pens at 4 coins?", "answer": "3 pens cost 3 * 4 coins.\\n#### 12"}

`match` names the rule of `tasks.matches` by which a final text counts as correct. Without it, an answer that ends in
`#### NUMBER` stands for that number, compared by `last_number`; one with `\\boxed{...}` for the content of the box,
compared by `math`; any other answer for itself, compared by `exact`. The whole file is read and checked when the task
is loaded.
Left out: other formats, scoring scripts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from puzzle_jax.errors import ConfigError, check_choice, shown
from puzzle_jax.files import parse_json, read_text
from puzzle_jax.tasks.base import Problem
from puzzle_jax.tasks.matches import MATCHES, is_right, number, only_boxed, worked_answer

_RULES = 2
"""Incremented whenever a rule of `tasks.matches` changes its result for some text."""


@dataclass(frozen=True)
class Row:
    """One line: prompt, correct answer, the rule that compares texts with it (one of `MATCHES`), and line number."""

    prompt: str
    answer: str
    match: str = "exact"
    line: int = 0


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
        lines = read_text(Path(path), ConfigError).removeprefix("\ufeff").split("\n")
        rows = tuple(
            _row(f"{path}, line {number}", line, number) for number, line in enumerate(lines, 1) if line.strip()
        )
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
        where = f"{self.name}, line {row.line}"
        return Problem(self.name, seed, row.prompt, row.answer, entry=row.match, where=where)

    def score(self, problem: Problem, final_text: str) -> float:
        return float(is_right(problem.entry, problem.answer, final_text))

    @property
    def bounded(self) -> bool:
        return True

    @property
    def identity(self) -> str:
        content = json.dumps([_RULES, *(astuple(row)[:3] for row in self.rows)])
        return f"rows {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _row(where: str, line: str, number_of_line: int) -> Row:
    value = parse_json(line, where, ConfigError)
    if not isinstance(value, dict):
        raise ConfigError(f"{where} holds a {type(value).__name__}, but must hold an object")
    if "prompt" in value and "question" in value:
        raise ConfigError(f"{where} has both prompt and question, but must have one of them")
    prompt = _text(where, value, "question" if "question" in value else "prompt")
    answer, match = _compared(where, _text(where, value, "answer"), value)
    return Row(prompt, answer, match, number_of_line)


def _compared(where: str, answer: str, value: Mapping[str, object]) -> tuple[str, str]:
    """The answer that final texts are compared with, and the rule that compares them."""
    match, worked = value.get("match", "exact"), worked_answer(answer)
    check_choice(f"{where}: match", match, MATCHES)
    assert isinstance(match, str)
    if worked is not None and "match" not in value:
        return worked
    if worked is not None and match in ("number", "last_number", "math"):
        answer = worked[0]
    elif worked is not None and not only_boxed(answer):
        raise ConfigError(
            f"{where}: match is {match!r}, but the answer is a solution that ends in {_ending(answer)!r}, which final "
            f"texts do not repeat; leave match out to compare with {worked[0]!r} by {worked[1]!r}, or shorten it"
        )
    if match in ("number", "last_number") and number(answer) is None:
        raise ConfigError(f"{where}: match is {match!r}, but the answer is {shown(answer)}, which is no number")
    return answer, match


def _ending(answer: str) -> str:
    return answer.strip().rpartition("\n")[2][-60:]


def _text(where: str, value: Mapping[str, object], field: str) -> str:
    if field not in value:
        raise ConfigError(f"{where} has no field {field}, which every row must have")
    text = value[field]
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: {field} is {shown(text)}, but must be a text that is not empty")
    return text
