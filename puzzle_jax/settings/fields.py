"""The settings that a dataclass of dataclasses has, by dotted name, and what of a user's input does not name one.

`recipe_files` looks here before it hands files and command lines to the parser, which takes much for granted: a field
that does not exist is answered with what was perhaps meant, and one value is enough where a list is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from puzzle_jax.commands import did_you_mean, refuse_option
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.files import parse_yaml

_TEXTS = (str, Path)
_LARGEST = 10**30
_CLASSES = {"class_path", "init_args"}  # by which the parser would import what a file names
_LONG_NUMBER = re.compile(r"[-+]?[\d_]{31,}(\.\d*)?")


def setting_hints(kind: type, prefix: str = "") -> dict[str, Any]:
    """Types by dotted name: of sections, which are dataclasses, and of the fields in them."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[f"{prefix}{name}"] = hint
        if is_dataclass(hint) and isinstance(hint, type):
            found |= setting_hints(hint, f"{prefix}{name}.")
    return found


def checked_arguments(arguments: Sequence[str], kind: type, others: Sequence[str]) -> list[str]:
    """Arguments whose options all exist, with single values of lists made lists.

    Args:
      arguments: of a command line.
      kind: a dataclass whose fields are options.
      others: further options ("--recipe").

    Raises `ConfigError` for an option that does not exist, and a value in YAML that cannot be read.
    """
    hints = setting_hints(kind)
    known = [f"--{name}" for name in hints] + list(others)
    found = list(arguments)
    for index, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or name in others:
            continue
        hint = hints.get(name.removeprefix("--"))
        if hint is None and not _in_mapping(name.removeprefix("--"), hints):
            refuse_option(name, known)
        if equals:
            found[index] = f"{name}={_value(name, value, hint)}"
        elif index + 1 < len(found) and not found[index + 1].startswith("--"):
            found[index + 1] = _value(name, found[index + 1], hint)
    return found


def checked_fields(given: Mapping[str, Any], kind: type, where: str) -> dict[str, Any]:
    """The fields of a recipe file, with single values of lists made lists.

    Raises `ConfigError`, which begins with `where`, for a field that does not exist.
    """
    hints = setting_hints(kind)
    return {name: _field(name, value, hints, where) for name, value in given.items()}


def _field(name: str, value: Any, hints: Mapping[str, Any], where: str) -> Any:
    if name not in hints:
        section = name.rpartition(".")[0]
        beside = [known for known in hints if known.rpartition(".")[0] == section]
        there = f"{section or 'a recipe'} has {', '.join(known.rpartition('.')[2] for known in beside)}"
        raise ConfigError(
            f"{where} has the field {name}, which does not exist{did_you_mean(name, hints) or f'; {there}'}"
        )
    hint = hints[name]
    _check_value(value, f"{where}: {name}")
    if is_dataclass(hint) and value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name} is {shown(value)}, but must be a mapping of its fields")
    if is_dataclass(hint) and isinstance(value, Mapping):
        return {str(inner): _field(f"{name}.{inner}", of, hints, where) for inner, of in value.items()}
    _check_elements(value, hint, f"{where}: {name}")
    return [value] if _element(hint) is not None and isinstance(value, _single(hint)) else value


def _value(name: str, value: str, hint: Any) -> str:
    """An option's value as the parser wants it; what is written in YAML is bounded like a file."""
    _check_value(value, name)
    if hint is None or _is_text(hint):
        return value
    if _LONG_NUMBER.fullmatch(value.strip()):
        raise ConfigError(f"{name} is {shown(value)}, but no setting is as large as that")
    flow = value.lstrip()[:1] in ("[", "{")
    if flow or any(sign in value for sign in "&*"):
        parsed = parse_yaml(value, name, ConfigError)
        _check_value(parsed, name)
        _check_elements(parsed, hint, name)
    element = _element(hint)
    if element is None or flow or not value.strip() or value.strip() in ("null", "~"):
        return value
    if element is Path:
        return json.dumps([value])
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return json.dumps(parts) if element is str else f"[{', '.join(parts)}]"


def _check_elements(value: Any, hint: Any, where: str) -> None:
    """Raises `ConfigError` for a field that the dataclass of a list's elements has not."""
    kinds = [of for option in hint_options(hint) for of in get_args(option) if is_dataclass(of)]
    for element in value if kinds and isinstance(value, list) else ():
        known = [field.name for field in fields(kinds[0])]
        for name in element if isinstance(element, Mapping) else ():
            if name not in known:
                hinted = did_you_mean(str(name), known) or f"; there are {', '.join(known)}"
                raise ConfigError(f"{where} has the field {shown(name)}, which does not exist{hinted}")


def _check_value(value: Any, where: str) -> None:
    """Raises `ConfigError` for whole numbers beyond any setting, for NUL in texts, and for classes to be imported."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{where} is {shown(value)}, but no setting is as large as that")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} is {shown(value)}, but no setting holds a NUL")
    if isinstance(value, Mapping) and not _CLASSES.isdisjoint(value):
        raise ConfigError(f"{where} names a class of Python ({shown(dict(value))}), but recipes hold values only")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check_value(item, where)


def _element(hint: Any) -> Any:
    """The type of a list's elements, where they are single values; None for what is no list of such."""
    options = [option for option in hint_options(hint) if get_origin(option) in (tuple, list, Sequence)]
    if not options or any(option in _TEXTS for option in hint_options(hint)):
        return None  # a field that takes one path or several already takes one
    elements = [of for of in get_args(options[0]) if of is not Ellipsis]
    return elements[0] if elements and not is_dataclass(elements[0]) else None


def _single(hint: Any) -> tuple[type, ...]:
    """Types of values in a file that stand for a list of one."""
    element = _element(hint)
    return (str,) if element in _TEXTS else (int, float)


def hint_options(hint: Any) -> Iterator[Any]:
    """The types of a union, or the one type."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            yield from hint_options(option)
    else:
        yield hint


def _is_text(hint: Any) -> bool:
    return all(option in (*_TEXTS, type(None)) for option in hint_options(hint))


def _in_mapping(name: str, hints: Mapping[str, Any]) -> bool:
    """Whether the name is a key of a field that is a mapping (`traces.max_tokens.low`)."""
    owner = hints.get(name.rpartition(".")[0])
    return any(get_origin(option) in (dict, Mapping) for option in hint_options(owner))
