"""Turns a prompt at an effort into tokens, and the tokens of an answer into its analysis and final text.

It works on the files that a checkpoint carries: tokenizer.json, the chat template and what configures both
(`reading`). The template is rendered with the sandbox, options and variables of transformers'
`apply_chat_template`, so that the ids are the same; transformers itself is not needed. Rendering takes place in a
separate process (`rendering`), which bounds its time and memory. The message format is harmony (gpt-oss): analysis and
final channels. Control tokens written out in a question or an answer stay ordinary text (`control_tokens`), unlike in
transformers, which by default turns them into control tokens.
Left out: tools (calls are recognised and skipped), other chat formats.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from puzzle_jax.errors import CheckpointError, ConfigError, shown
from puzzle_jax.files import is_unicode
from puzzle_jax.tasks.base import check_effort
from puzzle_jax.tasks.chat.control_tokens import ControlTokens
from puzzle_jax.tasks.chat.reading import read_ends, read_template, read_tokenizer
from puzzle_jax.tasks.chat.rendering import Template

_EFFORT_VARIABLE = "reasoning_effort"
_CHANNEL = re.compile(r"\w+")
_RECIPIENT = re.compile(r"(^|[\s>])to=")


@dataclass(frozen=True)
class Completion:
    """A model's answer, as texts.

    Attributes:
      analysis: text of the analysis channel, "" if there is none.
      final: text of the final channel, "" if the answer never reached it: truncated, stopped inside its analysis, or
        ended in a tool call.
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
      stop_ids: ids that end an answer.
      pad_id: id that pads rows.
    """

    tokenizer: tokenizers.Tokenizer
    template: Template
    stop_ids: frozenset[int]
    pad_id: int

    @classmethod
    def load(cls, directory: str | Path, today: datetime.datetime | None = None) -> Chat:
        """Reads the chat files of a checkpoint directory; the template sees the date `today`, by default now.

        Warns with `PuzzleWarning` if the checkpoint does not list the tokens that end a turn in the harmony format,
        which end an answer all the same. Raises `CheckpointError` if a file or field is missing or damaged, or the
        template never uses the effort.
        """
        directory = Path(directory)
        tokenizer, special = read_tokenizer(directory)
        for token in ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"):
            _special(tokenizer, token)
        template = read_template(directory, tokenizer, special, today or datetime.datetime.now())
        if _EFFORT_VARIABLE not in template.source:
            raise CheckpointError(
                f"the chat template {template.where} never uses {_EFFORT_VARIABLE}, "
                "but a reasoning model's template must render the effort"
            )
        stop_ids, pad_id = read_ends(directory, tokenizer)
        return cls(tokenizer, template, stop_ids, pad_id)

    @property
    def today(self) -> datetime.datetime:
        """The date that the template sees."""
        return self.template.today

    def prompt_tokens(self, prompt: str | Sequence[Mapping[str, object]], effort: str = "medium") -> list[int]:
        """Tokens of a conversation up to where the assistant begins.

        Args:
          prompt: one user message, or messages of the form {"role", "content"}. An assistant message's "thinking" is
            never rendered: earlier analysis is dropped from the history once there is a final answer.
          effort: one of `EFFORTS`.

        Raises:
          ConfigError: an unknown effort, or a message without role or content of valid Unicode.
          CheckpointError: the template refuses the conversation, or cannot be rendered.
        """
        check_effort(effort)
        messages = _history([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        marked = self._control.mark([text for message in messages for text in message], self.template.source)
        text = self.template.render(
            messages=[
                {"role": role, "content": content}
                for role, content in zip(marked.texts[::2], marked.texts[1::2], strict=True)
            ],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **{_EFFORT_VARIABLE: effort},
        )
        return self._control.encode(text, marked.tokens)

    def completion_tokens(self, analysis: str, final: str, *, cut: bool = False) -> list[int]:
        """Tokens that the assistant should write after `prompt_tokens`; an empty analysis gets no message.

        `cut` is for answers that a limit ended: they have no stop id, and without a final text end in their analysis.
        Raises `ConfigError` for a text that is not valid Unicode.
        """
        for name, text in (("analysis", analysis), ("final", final)):
            if not is_unicode(text):
                raise ConfigError(
                    f"the {name} text of the answer holds half a surrogate pair, but must be valid Unicode"
                )
        (analysis, final), tokens = self._control.mark([analysis, final], "")
        thought = f"<|channel|>analysis<|message|>{analysis}" if analysis else ""
        if cut and not final:
            return self._control.encode(thought, tokens)
        between = "<|end|><|start|>assistant" if analysis else ""
        end = "" if cut else "<|return|>"
        return self._control.encode(f"{thought}{between}<|channel|>final<|message|>{final}{end}", tokens)

    def has_control_tokens(self, *texts: str) -> bool:
        """Returns whether control tokens are written out in any of the texts, where they stay text."""
        return bool(self._control.mark(texts, "").tokens)

    def parse(self, tokens: Sequence[int]) -> Completion:
        """Splits what the assistant wrote into its channels.

        Everything after the first stop id is ignored. A message is skipped when its header is broken, its channel is
        another one (commentary), or it is addressed to a tool (`to=...`); several messages on one channel are joined by
        newlines. A constraint in the header (`<|constrain|>json`) does not change the channel.
        """
        tokens = [int(token) for token in tokens]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None:
            tokens = tokens[:stop]
        channel_id, message_id, end_id = (
            _special(self.tokenizer, token) for token in ("<|channel|>", "<|message|>", "<|end|>")
        )
        texts: dict[str, list[str]] = {"analysis": [], "final": []}
        for message in _split(tokens, end_id):
            if channel_id not in message or message_id not in message:
                continue
            start = message.index(message_id)
            name = _CHANNEL.match(self.decode(message[message.index(channel_id) + 1 : start]))
            if name is None or name[0] not in texts or _RECIPIENT.search(self.decode(message[:start])):
                continue
            texts[name[0]].append(self.decode(message[start + 1 :]))
        return Completion("\n".join(texts["analysis"]), "\n".join(texts["final"]), truncated=stop is None)

    def turn_to_final(self, tokens: Sequence[int]) -> tuple[int, int] | None:
        """First and last position of the tokens between the last two messages, from `<|end|>` to `<|message|>`; None
        where no message follows another. In a whole answer these are the analysis and the final message."""
        end_id, message_id = (_special(self.tokenizer, token) for token in ("<|end|>", "<|message|>"))
        opened = [position for position, token in enumerate(tokens) if token == message_id]
        ended = [position for position, token in enumerate(tokens) if token == end_id]
        return next(((end, opened[-1]) for end in reversed(ended) if opened and end < opened[-1]), None)

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text; special tokens in it become their ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special tokens included."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)


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


def _special(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    if index is None:
        raise CheckpointError(f"tokenizer.json has no token {token}, which the harmony format needs")
    return index


def _split(tokens: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
