"""What a parser of settings says, in the words of a recipe.

The parser speaks of types and classes of Python; people who write recipes know fields and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from puzzle_jax.commands import did_you_mean
from puzzle_jax.settings.fields import hint_options

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
_AFTER_VALUE = re.compile(" Subclass types expect| - Expected | - Not of type | Given value type")
_LONGEST_VALUE = 120


def plain_message(error: Exception, hints: Mapping[str, Any]) -> str:
    """One sentence for what a parser refused.

    Args:
      error: of the parser.
      hints: types of the settings, by dotted name.
    """
    text = " ".join(str(error).split())
    if missing := re.search(r"the following arguments are required: (.*)", text):
        inside = [name for name in _KEY.findall(text) if name in hints]
        return f"{inside[-1]} lacks {missing[1]}" if inside else f"{missing[1]} must be given"
    names = _KEY.findall(text)
    named = [name for name in names if name in hints]
    if not named:
        return text
    where = named[-1]
    hint, inner = hints[where], [name for name in names[names.index(where) + 1 :] if name not in hints]
    if inner:  # a field of a list's element
        element = _element_field(hint, inner[-1])
        where, hint = f"{where}: {inner[-1]}", hint if element is None else element
    value, words = _value(text), describe(hint)
    if value is None:
        kind = re.search(r"PathLike object, not (\w+)$", text)
        if kind is not None:
            return f"{where} is of type {kind[1]}, but must be {words}"
        return f"{where}: {text[list(_KEY.finditer(text))[-1].end() :]}"
    verb = (
        "holds"
        if value[:1] not in "[{"
        and _is_collection(hint)
        and not re.search(r"Expected a <class '(tuple|list|dict|collections.abc.Mapping)'>", text)
        else "is"
    )
    return f"{where} {verb} {value}, but must be {words}{did_you_mean(value, _choices(hint))}"


def describe(hint: Any) -> str:
    """What a setting of some type is, in words."""
    options = list(dict.fromkeys(map(_describe_one, hint_options(hint))))
    if options == [_WORDS[int], _WORDS[float]]:
        return _WORDS[float]
    if _WORDS[float] in options and _WORDS[int] in options:
        options.remove(_WORDS[int])
    return " or ".join([*(option for option in options if option != "null"), *(["null"] if "null" in options else [])])


def _describe_one(hint: Any) -> str:
    origin, arguments = get_origin(hint), [of for of in get_args(hint) if of is not Ellipsis]
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
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


def _element_field(hint: Any, name: str) -> Any:
    """The type of a field of the dataclass that a list holds."""
    for option in hint_options(hint):
        for element in get_args(option):
            if is_dataclass(element):
                return get_type_hints(element).get(name)
    return None


def _value(text: str) -> str | None:
    """The value that the parser names last."""
    found = list(re.finditer(r"(?:Got value|Given value): ", text))
    if found:
        return _short(_AFTER_VALUE.split(text[found[-1].end() :])[0])
    config = re.search(r"Unable to load config '(.*?)' - ", text)
    return None if config is None else _short(repr(config[1]))


def _is_collection(hint: Any) -> bool:
    return all(get_origin(of) in (*_MAPPINGS, *_LISTS) for of in hint_options(hint) if of is not NoneType)


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 3]}..."


def _choices(hint: Any) -> list[str]:
    return [str(value) for of in hint_options(hint) if get_origin(of) is Literal for value in get_args(of)]
