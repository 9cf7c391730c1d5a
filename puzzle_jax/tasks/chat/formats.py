"""Chat formats: how a family of models writes an answer, and what a reasoning effort is to a chat template.

A checkpoint's format is chosen by its tokenizer, and by its template where the tokenizer has the tokens of several
formats: harmony (gpt-oss) or ChatML (Qwen3). The tools speak of the efforts low, medium and high to all checkpoints:

    the template uses                low               medium, high
    reasoning_effort                 "low"             "medium", "high"
    enable_thinking                  thinking off      thinking on
    neither                          alike, whether the template always opens the thinking or knows none

Efforts that a template renders alike differ by the token limits that `max_tokens` gives them.
Left out: other variables of templates, and efforts that are written into the question (`/no_think`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

import tokenizers

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.chat.chatml import ChatML
from puzzle_jax.tasks.chat.harmony import Harmony
from puzzle_jax.tasks.chat.rendering import Template


@runtime_checkable
class Format(Protocol):
    """How answers are written and read.

    Methods take the tokens of the `prompt` that an answer follows, since a template may begin the answer itself; None
    stands for any question at medium effort. Texts may hold private characters in place of control tokens.

    Attributes:
      name: its name in messages.
      tokens: tokens that it needs; its templates write the first of them.
      ends: tokens that end an answer.
    """

    name: ClassVar[str]
    tokens: ClassVar[tuple[str, ...]]
    ends: ClassVar[tuple[str, ...]]

    @property
    def control(self) -> tuple[str, ...]:
        """Tokens with a meaning in the format, which stay text in questions and answers."""
        ...

    @property
    def in_history(self) -> tuple[str, ...]:
        """Those of them by which the template itself finds the thinking in earlier answers."""
        ...

    def variables(self, effort: str) -> dict[str, object]:
        """The template variables that an effort sets; equal ones for efforts that the template renders alike."""
        ...

    def written(self, analysis: str, final: str, prompt: Sequence[int] | None, cut: bool) -> str:
        """The text of an answer, control tokens included, as `Chat.completion_tokens` describes it.

        Raises `ConfigError` for an analysis after a prompt that leaves no room for one.
        """
        ...

    def split(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[str, str]:
        """Analysis and final text of an answer's tokens, without its stop id."""
        ...

    def split_text(self, text: str, prompt: Sequence[int] | None, cut: bool) -> tuple[str, str]:
        """Analysis and final text of an answer that a server gives as one text; `cut` if a limit ended it."""
        ...

    def turn(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[int, int] | None:
        """First and last position of the turn from analysis to final text, None where there is none."""
        ...


FORMATS: tuple[type[Harmony] | type[ChatML], ...] = (Harmony, ChatML)


def choose_format(tokenizer: tokenizers.Tokenizer, template: Template, directory: Path) -> Format:
    """The format of a checkpoint.

    Raises:
      CheckpointError: tokenizer.json lacks a token of every format, or the template does not suit the format.
    """
    lacking = {kind: [t for t in kind.tokens if tokenizer.token_to_id(t) is None] for kind in FORMATS}
    known = [kind for kind in FORMATS if not lacking[kind]]
    if not known:
        needed = (f"no token {lacking[kind][0]}, which the {kind.name} format needs" for kind in FORMATS)
        raise CheckpointError(f"{directory / 'tokenizer.json'} has {', and '.join(needed)}")
    chosen = next((kind for kind in known if template.uses(kind.tokens[0])), known[0])
    return chosen(tokenizer, template)


def alike(format: Format, limits: Mapping[str, int]) -> list[list[str]]:
    """The efforts that have both equal renderings and equal token limits, in groups of two or more."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for effort, limit in limits.items():
        groups.setdefault((limit, *sorted(format.variables(effort).items())), []).append(effort)
    return [group for group in groups.values() if len(group) > 1]
