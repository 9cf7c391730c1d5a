r"""The ChatML format of Qwen3: an answer is one message, which may begin with its thinking.

    <think>\n2 + 2\n</think>\n\n4<|im_end|>

Templates differ in how much of this they write themselves, at the end of the prompt:

    hybrid models, thinking on       nothing: the answer begins with <think>
    hybrid models, thinking off      <think>\n\n</think>\n\n: the answer is final text
    models that always think         <think>\n: the answer begins inside the thinking
    models that never think          nothing: the answer is final text

So an answer is written and read as what its prompt leaves to write. What the models were trained on is described in the
Qwen3 report (arXiv 2505.09388, section 4.3). Left out: tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import ClassVar

import tokenizers

from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.tasks.chat.rendering import EFFORT, Template

THINK, END_THINK, START, END = "<think>", "</think>", "<|im_start|>", "<|im_end|>"
_SWITCH = "enable_thinking"


class _Begun(Enum):
    """How far a prompt begins the answer."""

    NOT = "not at all"
    THINKING = "inside the thinking"
    FINAL = "behind an empty thinking"


@dataclass(frozen=True)
class ChatML:
    """The ChatML format with a checkpoint's tokenizer and template; a `Format`.

    Raises `CheckpointError` if the template writes `<think>` and the tokenizer has no such token.
    """

    tokenizer: tokenizers.Tokenizer
    template: Template

    name: ClassVar[str] = "ChatML"
    tokens: ClassVar[tuple[str, ...]] = (START, END)
    ends: ClassVar[tuple[str, ...]] = (END,)

    def __post_init__(self) -> None:
        for token in self.in_history:
            if self.tokenizer.token_to_id(token) is None:
                raise CheckpointError(
                    f"the chat template {self.template.where} writes {THINK} and {END_THINK}, "
                    f"but tokenizer.json has no token {token}"
                )

    @property
    def control(self) -> tuple[str, ...]:
        return (*self.tokens, *self.in_history)

    @property
    def in_history(self) -> tuple[str, ...]:
        return (THINK, END_THINK) if self.template.uses(THINK, END_THINK) else ()

    def variables(self, effort: str) -> dict[str, object]:
        if self.template.uses(EFFORT):
            return {EFFORT: effort}
        return {_SWITCH: effort != "low"} if self.template.uses(_SWITCH) else {}

    def written(self, analysis: str, final: str, prompt: Sequence[int] | None, cut: bool) -> str:
        begun = self._begun(prompt)
        if analysis and (begun is _Begun.FINAL or not self.in_history):
            off = "switches it off for this question, as it does at low effort" if self.in_history else "has none"
            raise ConfigError(f"the answer has thinking, but the chat template {self.template.where} {off}")
        thought = analysis if begun is _Begun.THINKING else f"{THINK}\n{analysis}"
        if cut and not final:
            return thought if analysis else ""
        end = "" if cut else END
        if begun is _Begun.FINAL or not (analysis or begun is _Begun.THINKING or self._thinks):
            return f"{final}{end}"
        return f"{thought}\n{END_THINK}\n\n{final}{end}"

    def split(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[str, str]:
        r"""The texts before and after the first `</think>`, without the newlines that the format has beside it.

        Without a `</think>`, an answer that has begun to think has no final text, and any other is all final.
        """
        thinking = self._thinking(tokens, prompt)
        if thinking is None:
            return "", self._text(tokens)
        first, end = thinking
        analysis = self._text(tokens[first:end])
        analysis = analysis.removeprefix("\n") if first else analysis
        return (analysis, "") if end is None else (analysis.removesuffix("\n"), _final(self._text(tokens[end + 1 :])))

    def split_text(self, text: str, prompt: Sequence[int] | None, cut: bool) -> tuple[str, str]:
        """The same for a text: it thinks if it begins with `<think>`, or its prompt does and it goes on from there."""
        begins = bool(self.in_history) and text.lstrip().startswith(THINK)
        if not begins and not ((cut or END_THINK in text) and self._begun(prompt) is _Begun.THINKING):
            return "", text
        text = text.lstrip().removeprefix(THINK).removeprefix("\n") if begins else text
        analysis, end, final = text.partition(END_THINK)
        return (analysis.removesuffix("\n"), _final(final)) if end else (analysis, "")

    def turn(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[int, int] | None:
        """From the first `</think>` to the newlines after it."""
        thinking = self._thinking(tokens, prompt)
        if thinking is None or thinking[1] is None:
            return None
        first = last = thinking[1]
        while last < first + 2 and last + 1 < len(tokens) and self._text(tokens[last + 1 : last + 2]) in ("\n", "\n\n"):
            last += 1
        return first, last

    def _thinking(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[int, int | None] | None:
        """The first position of the thinking and that of `</think>`, if it has one; None for an answer without."""
        if not self.in_history:
            return None
        think, end_think = map(self.tokenizer.token_to_id, (THINK, END_THINK))
        begun, first = self._begun(prompt), 0
        opened = next((position for position, token in enumerate(tokens) if token == think), None)
        if opened is not None and not self._text(tokens[:opened]).strip():
            first = opened + 1
        elif begun is _Begun.FINAL or (begun is _Begun.NOT and not (self._thinks and end_think in tokens)):
            return None
        return first, next((p for p in range(first, len(tokens)) if tokens[p] == end_think), None)

    def _begun(self, prompt: Sequence[int] | None) -> _Begun:
        if not self.in_history:
            return _Begun.NOT
        if prompt is None:
            return self._usually_begun
        start, think, end_think = map(self.tokenizer.token_to_id, (START, THINK, END_THINK))
        for token in reversed(prompt):
            if token in (start, think, end_think):
                return {start: _Begun.NOT, think: _Begun.THINKING, end_think: _Begun.FINAL}[token]
        return _Begun.NOT

    @cached_property
    def _usually_begun(self) -> _Begun:
        text = self.template.render_prompt([{"role": "user", "content": "?"}], self.variables("medium"))
        return self._begun(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @property
    def _thinks(self) -> bool:
        """Returns whether all answers begin with a thinking, though it may be empty, unless the prompt does.

        Templates that write `<think>` in earlier answers alone belong to models that do not think.
        """
        return bool(self.in_history) and self.template.uses(EFFORT, _SWITCH)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)


def _final(text: str) -> str:
    return text.removeprefix("\n").removeprefix("\n")
