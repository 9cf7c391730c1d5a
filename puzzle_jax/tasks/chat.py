"""From a prompt and an effort to tokens, and from tokens back to analysis and final text.

Works on the files that a checkpoint carries: tokenizer.json, chat_template.jinja (or `chat_template` in
tokenizer_config.json), and the end and pad ids of generation_config.json or config.json. The template is rendered
with the same sandbox and options as transformers' `apply_chat_template`, so that the ids are the same; transformers
itself is not needed. The message form is harmony (gpt-oss): analysis and final channels. Special tokens written out
in a prompt become special tokens, as they do in transformers.
Left out: tools (calls are recognised and set aside), other chat formats.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.tasks.base import check_effort

_EFFORT_VARIABLE = "reasoning_effort"
_CHANNEL = re.compile(r"\w+")
_RECIPIENT = re.compile(r"(^|[\s>])to=")


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Attributes:
      analysis: text of the analysis channel, "" when it wrote none.
      final: text of the final channel, "" when it never got there: cut short, stopped inside its analysis, or ended
        in a call.
      truncated: whether the tokens end before a stop id does.
    """

    analysis: str
    final: str
    truncated: bool


@dataclass(frozen=True)
class Chat:
    """A checkpoint's tokenizer and chat template. Make one with `Chat.load(directory)`.

    Attributes:
      tokenizer: the checkpoint's tokenizer.
      template: source text of its Jinja chat template.
      stop_ids: ids that end an answer.
      pad_id: id that fills rows.
      today: what `strftime_now` says inside the template; fixed, so that one run sees one date.
    """

    tokenizer: tokenizers.Tokenizer
    template: str
    stop_ids: frozenset[int]
    pad_id: int
    today: datetime.datetime

    @classmethod
    def load(cls, directory: str | Path, today: datetime.datetime | None = None) -> Chat:
        """Reads the chat files of a checkpoint directory.

        Raises:
          CheckpointError: a file or field is missing or damaged, or the template knows no effort.
        """
        directory = Path(directory)
        tokenizer = _read_tokenizer(directory / "tokenizer.json")
        template = _read_template(directory)
        if _EFFORT_VARIABLE not in template:
            raise CheckpointError(
                f"the chat template in {directory} never uses {_EFFORT_VARIABLE}, "
                "but a reasoning model's template must render the effort"
            )
        settings = _read_json(directory / "config.json")
        settings |= _read_json(directory / "generation_config.json")
        stop_ids = _stop_ids(settings, directory)
        pad_id = settings.get("pad_token_id")
        chat = cls(
            tokenizer=tokenizer,
            template=template,
            stop_ids=stop_ids,
            pad_id=min(stop_ids) if pad_id is None else int(pad_id),
            today=today or datetime.datetime.now(),
        )
        for token in ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"):
            chat._special(token)
        return chat

    def prompt_tokens(self, prompt: str | Sequence[Mapping[str, Any]], effort: str = "medium") -> list[int]:
        """Tokens of a conversation up to where the assistant begins.

        Args:
          prompt: one user message, or messages of the form {"role", "content"}. What an assistant's message thought
            ("thinking") is never rendered: earlier analysis leaves the history once there is a final answer.
          effort: one of `EFFORTS`.

        Raises:
          ConfigError: an unknown effort, or a message without role or content.
          CheckpointError: the template refuses the conversation.
        """
        check_effort(effort)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _history(prompt)
        return self.encode(
            self._render(messages=messages, add_generation_prompt=True, **{_EFFORT_VARIABLE: effort}),
        )

    def completion_tokens(self, analysis: str, final: str, *, cut: bool = False) -> list[int]:
        """Tokens that the assistant should write after `prompt_tokens`; no analysis message when it is "".

        `cut` gives an answer that a limit ended: it has no stop id, and without a final text ends in its analysis.
        """
        thought = f"<|channel|>analysis<|message|>{analysis}" if analysis else ""
        if cut and not final:
            return self.encode(thought)
        between = "<|end|><|start|>assistant" if analysis else ""
        end = "" if cut else "<|return|>"
        return self.encode(f"{thought}{between}<|channel|>final<|message|>{final}{end}")

    def parse(self, tokens: Sequence[int]) -> Completion:
        """Splits what the assistant wrote into its channels.

        Everything after the first stop id is ignored. A message is skipped when its header is broken, its channel is
        another one (commentary), or it goes to a tool (`to=...`); several messages on one channel are joined by new
        lines. A constraint in the header (`<|constrain|>json`) says nothing about the channel.
        """
        tokens = [int(token) for token in tokens]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None:
            tokens = tokens[:stop]
        channel_id, message_id, end_id = (self._special(t) for t in ("<|channel|>", "<|message|>", "<|end|>"))
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

    def encode(self, text: str) -> list[int]:
        """Tokens of a rendered text; special tokens in it become their ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, special tokens included."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise CheckpointError(f"tokenizer.json has no token {token}, which the harmony format needs")
        return index

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self.today.strftime
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template is no valid Jinja: {error}") from None

    def _render(self, **variables: Any) -> str:
        try:
            return self._compiled.render(**variables)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template refused the conversation: {error}") from None


def _history(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Role and content of every message."""
    if not messages:
        raise ConfigError("the conversation has no message, but must have at least one")
    history = []
    for number, message in enumerate(messages, 1):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ConfigError(f"message {number}: {field} is {message.get(field)!r}, but must be a text")
        history.append({"role": message["role"], "content": message["content"]})
    return history


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _split(tokens: list[int], separator: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == separator:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, but a checkpoint must carry its tokenizer")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for any damage
        raise CheckpointError(f"{path} is no valid tokenizer: {error}") from None


def _read_template(directory: Path) -> str:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path} does not exist, but a checkpoint must carry its chat template")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, but must hold an object")
    return value


def _stop_ids(settings: dict[str, Any], directory: Path) -> frozenset[int]:
    value = settings.get("eos_token_id")
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not ids or not all(isinstance(index, int) and not isinstance(index, bool) for index in ids):
        raise CheckpointError(
            f"eos_token_id in {directory}/generation_config.json or config.json is {value!r}, "
            "but must be a token id or a list of them"
        )
    return frozenset(int(index) for index in ids)
