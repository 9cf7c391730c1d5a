"""Splits a command line into options with their values, and positional words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.settings.fields import Setting, hint_options

OTHER_OPTIONS = ("--recipe", "--print_config", "--help", "--help-all")
"""Options of every verb besides its settings."""

_OPTION = re.compile(r"--|-[A-Za-z]\w*$")
_TRUTH = ("true", "false", "yes", "no", "null")


def read_arguments(
    arguments: Sequence[str], settings: Mapping[str, Setting], positional: Sequence[str] = ()
) -> tuple[list[tuple[str, Any]], list[str]]:
    """Returns the options in order, and the positional words.

    "-" and "_" are equivalent in names. A setting that is true or false needs no value, and `--no-NAME` makes it false.
    A list or a mapping takes several words, unless the verb has positional arguments, which they could be.

    Args:
      arguments: words of the command line.
      settings: all settings by name.
      positional: names of the settings that are given by position.

    Returns:
      Pairs of a setting's name, or "--recipe", and its text (a list for several paths, a dictionary if the name is
      followed by a key of a mapping); and the positional words.

    Raises `ConfigError` for an option that does not exist or lacks its value, and for a word too many.
    """
    options: list[tuple[str, Any]] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            words += rest
            break
        if not _OPTION.match(argument):
            words.append(argument)
            continue
        given, equals, text = argument.partition("=")
        name, key, value = _named(given, settings)
        if value is not None or name == OTHER_OPTIONS[1]:
            options.append((name, value))
            continue
        setting = settings.get(name)
        texts = [text] if equals else []
        several = setting is not None and key is None and _takes_several(setting) and not positional
        if setting is not None and setting.is_flag and not equals and not _is_truth(rest, bool(positional)):
            texts = ["true"]
        while not equals and rest and not rest[0].startswith("--") and (several or not texts):
            texts.append(rest.pop(0))
        if not texts:
            raise ConfigError(f"{given} needs a value")
        value = texts[0] if len(texts) == 1 else texts if setting and _of_paths(setting) else ",".join(texts)
        options.append((name, value if key is None else {key: value}))
    if len(words) > len(positional):
        raise ConfigError(f"{shown(words[len(positional)])} is one argument too many")
    return options, words


def _named(given: str, settings: Mapping[str, Setting]) -> tuple[str, str | None, str | None]:
    """The setting that an option names, the mapping key that follows the name, and the value that `no_` implies."""
    name = given.removeprefix("--").replace("-", "_")
    if f"--{name}" in OTHER_OPTIONS:
        return f"--{name}", None, None
    if name in settings and given.startswith("--"):
        return name, None, None
    section, dot, field = name.rpartition(".")
    negated = settings.get(f"{section}{dot}{field.removeprefix('no_')}")
    if negated is not None and negated.is_flag and field.startswith("no_"):
        return negated.name, None, "false"
    for end in (found.start() for found in re.finditer(r"\.", given)):
        owner = settings.get(given[:end].removeprefix("--").replace("-", "_"))
        if owner is not None and owner.mapping is not None and given[end + 1 :]:
            return owner.name, given[end + 1 :], None
    known = [*(f"--{name}" for name in settings), *OTHER_OPTIONS]
    hint = did_you_mean(f"--{name}" if given.startswith("--") else given, known) or "; --help lists those there are"
    raise ConfigError(f"there is no option {given}{hint}")


def _is_truth(rest: Sequence[str], positional: bool) -> bool:
    """Returns whether a flag's value follows; with positional arguments, only an unmistakable word counts."""
    return bool(rest) and not rest[0].startswith("--") and (not positional or rest[0].lower() in _TRUTH)


def _takes_several(setting: Setting) -> bool:
    return setting.mapping is not None or (setting.element is not None and not is_dataclass(setting.element))


def _of_paths(setting: Setting) -> bool:
    return setting.element is Path or Path in hint_options(setting.hint)
