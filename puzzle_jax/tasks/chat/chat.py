"""Turns a prompt at an effort into tokens, and the tokens of an answer into its analysis and final text.

It works on the files that a checkpoint carries: tokenizer.json, the chat template and what configures both
(`reading`). The template is rendered with the sandbox, options and variables of transformers'
`apply_chat_template`, so that the ids are the same; transformers itself is not needed. Rendering takes place in a
separate process (`rendering`), which bounds its time and memory. How an answer is written, and what an effort is to the
template, depends on the format (`formats`). Control tokens written out in a question or an answer stay ordinary text
(`control_tokens`), unlike in transformers, which by default turns them into control tokens.
Left out: tools, chat formats other than harmony and ChatML.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.files import is_unicode
from puzzle_jax.tasks.base import check_effort
from puzzle_jax.tasks.chat.control_tokens import ControlTokens
from puzzle_jax.tasks.chat.formats import Format, choose_format
from puzzle_jax.tasks.chat.reading import read_ends, read_template, read_tokenizer
from puzzle_jax.tasks.chat.rendering import Template


@dataclass(frozen=True)
class Completion:
    """A model's answer, as texts.

    Attributes:
      analysis: text of the analysis channel or the thinking, "" if there is none.
      final: the final text, "" if the answer never reached it: truncated, stopped inside its analysis, or ended in a
        tool call.
      truncated: whether the tokens contain no stop id.
    """

    analysis: str
    final: str
    truncated: bool


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and chat template. Make one with `Chat.load(directory)`.

    Attributes:
      tokenizer: the checkpoint's tokenizer.
      template: its chat template, with the special tokens that it may write and the date that it sees.
      format: how its answers are written.
      stop_ids: ids that end an answer.
      pad_id: id that pads rows.
    """

    tokenizer: tokenizers.Tokenizer
    template: Template
    format: Format
    stop_ids: frozenset[int]
    pad_id: int

    @classmethod
    def load(cls, directory: str | Path, today: datetime.datetime | None = None) -> Chat:
        """Reads the chat files of a checkpoint directory; the template sees the date `today`, by default now.

        Warns with `PuzzleWarning` if the checkpoint does not list the tokens that end a turn in its format, which end
        an answer all the same. Raises `CheckpointError` if a file or field is missing or damaged, the tokenizer lacks
        tokens of the format, or a harmony template never uses the effort.
        """
        directory = Path(directory)
        tokenizer, special = read_tokenizer(directory)
        template = read_template(directory, tokenizer, special, today or datetime.datetime.now())
        format = choose_format(tokenizer, template, directory)
        stop_ids, pad_id = read_ends(directory, tokenizer, format.ends, format.name)
        return cls(tokenizer, template, format, stop_ids, pad_id)

    @property
    def today(self) -> datetime.datetime:
        """The date that the template sees."""
        return self.template.today

    def prompt_tokens(self, prompt: str | Sequence[Mapping[str, object]], effort: str = "medium") -> list[int]:
        """Tokens of a conversation up to where the assistant begins.

        Args:
          prompt: one user message, or messages of the form {"role", "content"}. An assistant message's "thinking" is
            never rendered: earlier analysis is dropped from the history once there is a final answer.
          effort: one of `EFFORTS`; `formats` says what it is to the template.

        Raises:
          ConfigError: an unknown effort, or a message without role or content of valid Unicode.
          CheckpointError: the template refuses the conversation, or cannot be rendered.
        """
        check_effort(effort)
        messages = _history([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        marked = self._control.mark([text for message in messages for text in message], self.template.source)
        rendered = [
            {"role": role, "content": self._of_history(content, marked.tokens) if role == "assistant" else content}
            for role, content in zip(marked.texts[::2], marked.texts[1::2], strict=True)
        ]
        return self._control.encode(self.template.render_prompt(rendered, self.format.variables(effort)), marked.tokens)

    def completion_tokens(
        self, analysis: str, final: str, prompt: Sequence[int] | None = None, *, cut: bool = False
    ) -> list[int]:
        """Tokens that the assistant should write after a prompt.

        An empty analysis gets no message on a channel, but in ChatML an empty thinking where the model has one.

        Args:
          prompt: the tokens of `prompt_tokens`, which may begin the answer; by default those of any question at medium
            effort.
          cut: for answers that a limit ended: they have no stop id, and without a final text end in their analysis.

        Raises:
          ConfigError: a text is not valid Unicode, or there is an analysis but the model has no thinking, or none after
            this prompt.
        """
        for name, text in (("analysis", analysis), ("final", final)):
            if not is_unicode(text):
                raise ConfigError(
                    f"the {name} text of the answer holds half a surrogate pair, but must be valid Unicode"
                )
        (analysis, final), tokens = self._control.mark([analysis, final], "")
        return self._control.encode(self.format.written(analysis, final, prompt, cut), tokens)

    def split_text(self, text: str, prompt: Sequence[int] | None = None, *, cut: bool = False) -> tuple[str, str]:
        """Analysis and final text of an answer that came as one text, as servers without a reasoning parser send it.

        Arguments as for `completion_tokens`.
        """
        return self.format.split_text(text, prompt, cut)

    def has_control_tokens(self, *texts: str) -> bool:
        """Returns whether control tokens are written out in any of the texts, where they stay text."""
        return bool(self._control.mark(texts, "").tokens)

    def parse(self, tokens: Sequence[int], prompt: Sequence[int] | None = None) -> Completion:
        """Splits what the assistant wrote after a prompt into analysis and final text.

        Everything after the first stop id is ignored. `prompt` is what `completion_tokens` takes.
        """
        tokens = [int(token) for token in tokens]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        analysis, final = self.format.split(tokens[:stop], prompt)
        return Completion(analysis, final, truncated=stop is None)

    def turn_to_final(self, tokens: Sequence[int], prompt: Sequence[int] | None = None) -> tuple[int, int] | None:
        """First and last position of the tokens with which an answer to a prompt changes from analysis to final text.

        In harmony they reach from `<|end|>` to `<|message|>`; in ChatML they are `</think>` and the newlines after it.
        None where there is no such change. `prompt` is what `completion_tokens` takes.
        """
        return self.format.turn(tokens, prompt)

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text; special tokens in it become their ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special tokens included."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.format.control)

    def _of_history(self, content: str, tokens: Mapping[str, str]) -> str:
        """An earlier answer, with the control tokens by which the template drops its thinking."""
        for character, token in tokens.items():
            content = content.replace(character, token) if token in self.format.in_history else content
        return content


def _history(messages: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """Role and content of every message."""
    if not messages:
        raise ConfigError("the conversation has no message, but must have at least one")

    def text(number: int, field: str) -> str:
        value = messages[number].get(field)
        if not isinstance(value, str):
            raise ConfigError(f"message {number + 1}: {field} is {shown(value)}, but must be a text")
        if not is_unicode(value):
            raise ConfigError(f"message {number + 1}: {field} holds half a surrogate pair, but must be valid Unicode")
        return value

    return [(text(number, "role"), text(number, "content")) for number in range(len(messages))]
