"""From a prompt and an effort to tokens, and from tokens back to analysis and final text.

Works on the files that a checkpoint carries: tokenizer.json, chat_template.jinja (or `chat_template` in
tokenizer_config.json), and the end and pad ids of generation_config.json or config.json. The template is rendered
with the same sandbox and options as transformers' `apply_chat_template`, so that the ids are the same; transformers
itself is not needed. The message form is harmony (gpt-oss): analysis and final channels.
Left out: tools, several turns, other chat formats.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.base import check_effort

_EFFORT_VARIABLE = "reasoning_effort"


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    Attributes:
      analysis: text of the analysis channel, "" when it wrote none.
      final: text of the final channel, "" when it never got there.
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

    def prompt_tokens(self, prompt: str, effort: str = "medium") -> list[int]:
        """Tokens of a conversation with one user message, up to where the assistant begins."""
        check_effort(effort)
        text = self._render(
            messages=[{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            **{_EFFORT_VARIABLE: effort},
        )
        return self.encode(text)

    def completion_tokens(self, analysis: str, final: str) -> list[int]:
        """Tokens that the assistant should write after `prompt_tokens`; no analysis message when it is ""."""
        text = f"<|channel|>final<|message|>{final}<|return|>"
        if analysis:
            text = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant{text}"
        return self.encode(text)

    def parse(self, tokens: Sequence[int]) -> Completion:
        """Splits what the assistant wrote into its channels.

        Everything after the first stop id is ignored. A message whose header is broken or whose channel is another
        one (commentary) is skipped; several messages on one channel are joined by new lines.
        """
        tokens = [int(token) for token in tokens]
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None:
            tokens = tokens[:stop]
        channel_id, message_id, end_id = (self._special(t) for t in ("<|channel|>", "<|message|>", "<|end|>"))
        texts: dict[str, list[str]] = {}
        for message in _split(tokens, end_id):
            if channel_id not in message or message_id not in message:
                continue
            header = message[message.index(channel_id) + 1 : message.index(message_id)]
            name = self.decode(header).split() or [""]
            texts.setdefault(name[0], []).append(self.decode(message[message.index(message_id) + 1 :]))
        return Completion(
            analysis="\n".join(texts.get("analysis", [])),
            final="\n".join(texts.get("final", [])),
            truncated=stop is None,
        )

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
