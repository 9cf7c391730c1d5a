"""The harmony format of gpt-oss: an answer is messages on channels, an analysis and a final one.

    <|channel|>analysis<|message|>2 + 2<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>

Its prompts end where the assistant begins, at any effort, so that an answer can be read without them.
Left out: tools; calls are recognised and skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tokenizers

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.chat.rendering import EFFORT, Template

_CHANNEL = re.compile(r"\w+")
_RECIPIENT = re.compile(r"(^|[\s>])to=")


@dataclass(frozen=True)
class Harmony:
    """The harmony format with a checkpoint's tokenizer; a `Format`.

    Raises `CheckpointError` if the template never uses the effort.
    """

    tokenizer: tokenizers.Tokenizer
    template: Template

    name: ClassVar[str] = "harmony"
    tokens: ClassVar[tuple[str, ...]] = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
    ends: ClassVar[tuple[str, ...]] = ("<|return|>", "<|call|>")

    def __post_init__(self) -> None:
        if EFFORT not in self.template.source:
            raise CheckpointError(
                f"the chat template {self.template.where} never uses {EFFORT}, "
                "but a template of the harmony format must render the effort"
            )

    @property
    def control(self) -> tuple[str, ...]:
        return (*self.tokens, "<|constrain|>", "<|call|>")

    @property
    def in_history(self) -> tuple[str, ...]:
        return ()

    def variables(self, effort: str) -> dict[str, object]:
        return {EFFORT: effort}

    def written(self, analysis: str, final: str, prompt: Sequence[int] | None, cut: bool) -> str:
        thought = f"<|channel|>analysis<|message|>{analysis}" if analysis else ""
        if cut and not final:
            return thought
        between = "<|end|><|start|>assistant" if analysis else ""
        end = "" if cut else "<|return|>"
        return f"{thought}{between}<|channel|>final<|message|>{final}{end}"

    def split(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[str, str]:
        """Texts of the two channels.

        A message is skipped when its header is broken, its channel is another one (commentary), or it is addressed to a
        tool (`to=...`); several messages on one channel are joined by newlines. A constraint in the header
        (`<|constrain|>json`) does not change the channel.
        """
        channel_id, message_id = map(self._id, ("<|channel|>", "<|message|>"))
        texts: dict[str, list[str]] = {"analysis": [], "final": []}
        for message in _parts(tokens, self._id("<|end|>")):
            if channel_id not in message or message_id not in message:
                continue
            start = message.index(message_id)
            name = _CHANNEL.match(self._text(message[message.index(channel_id) + 1 : start]))
            if name is None or name[0] not in texts or _RECIPIENT.search(self._text(message[:start])):
                continue
            texts[name[0]].append(self._text(message[start + 1 :]))
        return "\n".join(texts["analysis"]), "\n".join(texts["final"])

    def split_text(self, text: str, prompt: Sequence[int] | None, cut: bool) -> tuple[str, str]:
        return "", text

    def turn(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> tuple[int, int] | None:
        """From the `<|end|>` between the last two messages to `<|message|>`."""
        end_id, message_id = map(self._id, ("<|end|>", "<|message|>"))
        opened = [position for position, token in enumerate(tokens) if token == message_id]
        ended = [position for position, token in enumerate(tokens) if token == end_id]
        return next(((end, opened[-1]) for end in reversed(ended) if opened and end < opened[-1]), None)

    def _id(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        assert index is not None  # `choose_format` has seen to it
        return index

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)


def _parts(tokens: Sequence[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts
