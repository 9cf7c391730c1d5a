"""Translates the messages of the settings parser into the terms of a recipe.

The parser speaks of Python's types and classes; people who write recipes know fields and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import shown
from puzzle_jax.settings.fields import Setting, hint_options

_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    NoneType: "null",
}
_MAPPINGS, _LISTS = (dict, Mapping), (tuple, list, Sequence)
_KEY = re.compile(r'Parser key "([^"]+)": ')


def plain_message(error: Exception, settings: Mapping[str, Setting], values: Mapping[str, Any]) -> str:
    """One sentence for what a parser refused, given all settings and the values that it parsed, both by dotted name."""
    text = " ".join(str(error).split())
    keys = _KEY.findall(text)
    names = [name for name in keys if name in settings]
    if missing := re.search(r"the following arguments are required: (.*)", text):
        return f"{names[-1]} lacks {missing[1]}" if names else f"{missing[1]} must be given"
    if not names:
        return text
    name, inner = names[-1], next((key for key in reversed(keys) if key not in settings), None)
    setting, value = settings[name], values.get(name)
    if inner is not None and is_dataclass(setting.element):
        hint = get_type_hints(setting.element).get(inner)
        return f"{name}: {inner} must be {describe(hint)}, but {name} is {shown(value)}"
    return f"{name} is {shown(value)}, but must be {describe(setting.hint)}{did_you_mean(str(value), setting.choices)}"


def describe(hint: Any) -> str:
    """The values that a type hint allows, in words."""
    options = list(dict.fromkeys(map(_describe_one, hint_options(hint))))
    if options == [_WORDS[int], _WORDS[float]]:
        return _WORDS[float]
    if _WORDS[float] in options and _WORDS[int] in options:
        options.remove(_WORDS[int])
    text = " or ".join(option for option in options if option != "null")
    if "null" not in options or not text:
        return text or "null"
    return f"{text}, or null" if ", each " in text else f"{text} or null"


def _describe_one(hint: Any) -> str:
    origin, arguments = get_origin(hint), [of for of in get_args(hint) if of is not Ellipsis]
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in _MAPPINGS:
        return f"a mapping of names to {_plural(arguments[1])}" if len(arguments) == 2 else "a mapping"
    if origin in _LISTS:
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if is_dataclass(hint):
        return f"a mapping of {', '.join(field.name for field in fields(hint))}"
    return _WORDS.get(hint, str(getattr(hint, "__name__", hint)))


def _plural(hint: Any) -> str:
    words = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}
    if hint in words:
        return words[hint]
    described = describe(hint)
    return "numbers" if described == _WORDS[float] else f"values, each {described}"
