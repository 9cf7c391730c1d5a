"""Reads the chat files of a checkpoint: tokenizer, template, special tokens, the ids that end answers.

Precedence follows transformers: chat_template.jinja and additional_chat_templates/ come before `chat_template` in
tokenizer_config.json, and of several named templates the one called "default" is used; special_tokens_map.json comes
before tokenizer_config.json, unless the latter has `added_tokens_decoder`; generation_config.json comes before
config.json. Tokens that only these files define are added to the tokenizer, and truncation or padding that was saved
with the tokenizer is switched off.
Left out: tokenizer classes that rebuild the tokenizer in Python, special tokens that only such a class knows,
added_tokens.json.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from puzzle_jax.codec import from_plain
from puzzle_jax.errors import CheckpointError, PuzzleWarning, shown
from puzzle_jax.files import read_object, read_text
from puzzle_jax.tasks.chat.rendering import Template

TEMPLATE_FILE, TEMPLATE_DIRECTORY = "chat_template.jinja", "additional_chat_templates"

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read_tokenizer(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a checkpoint with the tokens that its configuration adds, and its special tokens by name.

    Raises:
      CheckpointError: tokenizer.json is missing or damaged, or a token of the configuration has an unknown form.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist, but a checkpoint must carry its tokenizer")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception for any damage, or panics
        raise CheckpointError(f"{path} is no valid tokenizer: {' '.join(str(error).split())}") from None
    known = {_form(token) for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(
        [token for token in _configured_tokens(directory / "tokenizer_config.json") if _form(token) not in known]
    )
    named = _special_tokens(directory, tokenizer)
    contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([
        tokenizers.AddedToken(text, special=True)
        for text in named.values()
        if text not in contents and tokenizer.token_to_id(text) is not None
    ])  # fmt: skip
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, named


def read_template(
    directory: Path, tokenizer: tokenizers.Tokenizer, tokens: Mapping[str, str], today: datetime.datetime
) -> Template:
    """The chat template that is rendered where there are no tools, with special tokens by name and the date it sees.

    Raises:
      CheckpointError: there is none, a file is damaged, none of several named ones is the default, or the template may
        write a special token that the tokenizer does not have.
    """
    sources = _template_files(directory) or _configured_templates(directory / "tokenizer_config.json")
    if not sources:
        raise CheckpointError(
            f"{directory / TEMPLATE_FILE} does not exist, but a checkpoint must carry its chat template"
        )
    if "default" not in sources:
        raise CheckpointError(
            f"{directory} has the chat templates {', '.join(sorted(sources))}, but none that is called default"
        )
    source, where = sources["default"]
    for name, text in tokens.items():
        if text and name in source and tokenizer.token_to_id(text) is None:
            raise CheckpointError(
                f"the chat template {where} writes {name}, which is {shown(text)} in the configuration of the "
                f"tokenizer, but tokenizer.json has no such token"
            )
    return Template(source, where, today, tokens)


def read_ends(
    directory: Path, tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], format: str
) -> tuple[frozenset[int], int]:
    """Ids that end an answer, and the id that pads rows.

    The end `tokens` of the `format` always count; a `PuzzleWarning` says so if the checkpoint does not list them.

    Raises:
      CheckpointError: an eos, bos or pad id is no token of the model.
    """
    config = _object(directory / "config.json")
    generation = _object(directory / "generation_config.json")
    vocab_size = config.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:  # Reading the model reports this.
        vocab_size = tokenizer.get_vocab_size()

    def ids(name: str, many: bool = False) -> tuple[list[int], Path]:
        file, value = "generation_config.json", generation.get(name)
        if value is None:
            file, value = "config.json", config.get(name)
        given = value if many and isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int and 0 <= index < vocab_size for index in given):
            form = f"a token id from 0 to {vocab_size - 1}{', or a list of them' if many else ''}"
            raise CheckpointError(f"{directory / file}: {name} is {shown(value)}, but must be {form}")
        return given, directory / file

    stops, where = ids("eos_token_id", many=True)
    ids("bos_token_id")
    pads, _ = ids("pad_token_id")
    ends = {token: index for token in tokens if (index := tokenizer.token_to_id(token)) is not None}
    lacking = [token for token, index in ends.items() if index not in stops]
    if lacking:
        given = (
            f"is {shown(stops[0] if len(stops) == 1 else stops)}, which lacks" if stops else "is not there; it lacks"
        )
        warnings.warn(
            f"{where}: eos_token_id {given} {' and '.join(lacking)}, where answers of the {format} format end; "
            "generation stops there all the same",
            PuzzleWarning,
            stacklevel=3,
        )
    stop_ids = frozenset(stops) | frozenset(ends.values())
    return stop_ids, pads[0] if pads else min(stops or stop_ids)


def _special_tokens(directory: Path, tokenizer: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens by name (`bos_token`), as the checkpoint's files give them to its template."""
    path = directory / "tokenizer_config.json"
    config = _object(path)
    named = {name: (value, path) for name, value in config.items() if _is_name(name)}
    extra = config.get("extra_special_tokens")
    if "added_tokens_decoder" not in config:
        path = directory / "special_tokens_map.json"
        mapped = _object(path)
        named |= {name: (value, path) for name, value in mapped.items() if _is_name(name)}
        extra = mapped.get("extra_special_tokens", extra)
    if isinstance(extra, dict):
        named |= {name: (value, path) for name, value in extra.items()}
    if tokenizer.padding is not None:
        named.setdefault("pad_token", (tokenizer.padding["pad_token"], directory / "tokenizer.json"))
    found = {}
    for name, (value, path) in named.items():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
        elif value is not None and name in _NAMES:
            raise CheckpointError(f"{path}: {name} is {shown(value)}, but must be a token's text")
    return found


def _template_files(directory: Path) -> dict[str, tuple[str, str]]:
    """Source and file of every template that has a file of its own, by name."""
    files = {"default": directory / TEMPLATE_FILE}
    files |= {
        path.name.removesuffix(".jinja"): path for path in sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))
    }
    return {name: (read_text(path, CheckpointError), str(path)) for name, path in files.items() if path.is_file()}


@dataclass(frozen=True)
class _NamedTemplate:
    name: str
    template: str


@dataclass(frozen=True)
class _AddedToken:
    content: str
    single_word: bool | None = None
    lstrip: bool | None = None
    rstrip: bool | None = None
    normalized: bool | None = None
    special: bool | None = None


@dataclass(frozen=True)
class _Templates:
    """Field of tokenizer_config.json: one template, or several by name."""

    chat_template: str | list[_NamedTemplate] | dict[str, str] | None = None


@dataclass(frozen=True)
class _AddedTokens:
    """Field of tokenizer_config.json: tokens by id."""

    added_tokens_decoder: dict[int, _AddedToken] = field(default_factory=dict)


def _configured_templates(path: Path) -> dict[str, tuple[str, str]]:
    """Source and place of every template in tokenizer_config.json, by name."""
    found = from_plain(_Templates, _object(path), str(path), CheckpointError).chat_template
    if isinstance(found, str):
        found = {"default": found}
    named = {each.name: each.template for each in found} if isinstance(found, list) else found or {}
    return {name: (source, f"of {path}") for name, source in named.items()}


def _configured_tokens(path: Path) -> list[tokenizers.AddedToken]:
    """Tokens that tokenizer_config.json describes, in order of their ids."""
    found = from_plain(_AddedTokens, _object(path), str(path), CheckpointError).added_tokens_decoder
    tokens = [asdict(token) for _, token in sorted(found.items())]
    return [tokenizers.AddedToken(**{key: value for key, value in t.items() if value is not None}) for t in tokens]


def _form(token: tokenizers.AddedToken) -> tuple[object, ...]:
    return (token.content, *(getattr(token, flag) for flag in _FLAGS))


def _is_name(name: str) -> bool:
    return name in _NAMES or name.endswith("_token")


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    return read_object(path, CheckpointError) if path.is_file() else {}
