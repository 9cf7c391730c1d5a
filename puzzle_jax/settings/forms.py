"""The forms in which settings are written: the only place where texts and YAML become values.

On the command line and in files alike,

    a list       is  a,b                 or YAML's [a, b]
    a mapping    is  low=32,high=128     or YAML's {low: 32, high: 128}
    a section    is  data=2,model=4      or YAML's {data: 2, model: 4}

A single value is enough where a list is expected; a list of names in place of a mapping to weights gives each the
weight 1; a list within a mapping has colons between its parts (`chat=160:128`). Names may contain ":" and "/", and
values "="; what contains commas is written in YAML. Paths may contain commas, so a list of paths is in YAML, too.

The result goes to the parser, which checks types; whatever violates its other assumptions is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.files import parse_yaml
from puzzle_jax.settings.fields import Setting, hint_options
from puzzle_jax.settings.files import with_embedded
from puzzle_jax.settings.messages import describe

_LARGEST = 10**30
_CLASSES = {"class_path", "init_args"}  # by which the parser would import what a file names
_LONG_NUMBER = re.compile(r"[-+]?[\d_]{31,}(\.\d*)?")
_NEXT_PAIR = re.compile(r",(?=[^,=]+=)")
_NULL = ("null", "~")
_WORDS = {"true": True, "false": False, "yes": True, "no": False}


def formed(value: Any, name: str, settings: Mapping[str, Setting], source: str) -> dict[str, Any]:
    """The values given for a setting, as the parser expects them: the fields of a section by dotted name, or one value.

    Args:
      value: text of the command line, or a YAML value.
      name: dotted name of the setting.
      settings: all settings by name.
      source: precedes the name in messages: "--" for an option, "recipe PATH: " for a field of a file.

    Raises `ConfigError` for what has none of the setting's forms, names a field that does not exist, or is larger than
    any setting.
    """
    if name not in settings:
        raise _unknown_field(name, settings, source)
    setting, where = settings[name], f"{source}{name}"
    _check(value, where)
    if isinstance(value, str) and not setting.is_text:
        value = _of_text(value, setting, where)
    if setting.read is not None:
        value = setting.read(value, where)
    if setting.of_paths:
        value = with_embedded(value, where)
    if setting.section is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {shown(value)}, but must be {describe(setting.hint)}")
        inner = (formed(of, f"{name}.{key}", settings, source) for key, of in value.items())
        return {field: of for fields in inner for field, of in fields.items()}
    if value is None and not setting.may_be_null:
        raise ConfigError(f"{where} is None, but must have a value")
    if setting.is_text and not isinstance(value, str | None):
        raise ConfigError(f"{where} is {shown(value)}, but must be {describe(setting.hint)}")
    if setting.of_weights and isinstance(value, list):
        value = _weights(value, where)
    elif setting.element is not None:
        _check_elements(value, setting.element, where)
        value = [value] if _is_single(value, setting) else value
    return {name: value}


def _unknown_field(name: str, settings: Mapping[str, Setting], source: str) -> ConfigError:
    """The error for a field that does not exist, with the name that was perhaps meant, or those that exist."""
    section = name.rpartition(".")[0]
    beside = [known.rpartition(".")[2] for known in settings if known.rpartition(".")[0] == section]
    there = f"; {section or 'a recipe'} has {', '.join(beside)}"
    where = source.removesuffix(": ") if source.endswith(": ") else f"{source}{section}"
    return ConfigError(f"{where} has the field {name}, which does not exist{did_you_mean(name, settings) or there}")


def _pairs(text: str, where: str, form: str) -> Iterator[tuple[str, str]]:
    """Names and values of a text `name=value,name=value`; only a comma before a name separates.

    Raises `ConfigError` for any other form, and for a name that occurs twice.
    """
    names: set[str] = set()
    for part in _NEXT_PAIR.split(text.rstrip(", ")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ConfigError(f"{where} has {shown(part)}, but must be {form}, of the form NAME=VALUE,NAME=VALUE")
        if key in names:
            raise ConfigError(f"{where} names {shown(key)} twice, but every name may come once only")
        names.add(key)
        yield key, value


def _of_text(text: str, setting: Setting, where: str) -> Any:
    """The value of a text in YAML or in one of the short forms; any other text is left to the parser."""
    stripped = text.strip()
    if _LONG_NUMBER.fullmatch(stripped):
        raise ConfigError(f"{where} is {shown(text)}, but no setting is as large as that")
    if stripped in _NULL:
        return None
    if stripped[:1] in ("[", "{") or any(sign in text for sign in "&*"):
        parsed = parse_yaml(text, where, ConfigError)
        _check(parsed, where)
        return parsed
    if setting.section is not None:
        return text if "=" not in text else dict(_pairs(text, where, describe(setting.hint)))
    if setting.mapping is not None:
        return _mapping(text, setting, where)
    if setting.element is None:
        return _scalar(text, setting.hint)
    if is_dataclass(setting.element):
        return dict(_pairs(text, where, describe(setting.hint))) if "=" in text else text
    if setting.element is Path or any(of in (str, Path) for of in hint_options(setting.hint)):
        return text
    return [_scalar(part.strip(), setting.element) for part in text.split(",") if part.strip()]


def _mapping(text: str, setting: Setting, where: str) -> Any:
    """A mapping, or a list of names that each get weight 1."""
    assert setting.mapping is not None
    of = setting.mapping[1]
    if "=" not in text and (setting.read is not None or setting.is_scalar):
        return _scalar(text, setting.hint)
    if "=" not in text and setting.of_weights:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts = [of for of in hint_options(of) if get_origin(of) in (tuple, Sequence)]
    found = dict(_pairs(text, where, describe(setting.hint)))
    if parts:
        element = get_args(parts[0])[0]
        return {key: [_scalar(part, element) for part in value.split(":")] for key, value in found.items()}
    return {key: _scalar(value, of) for key, value in found.items()}


def _weights(names: list[Any], where: str) -> dict[Any, float]:
    for index, name in enumerate(names):
        if not isinstance(name, str) or name in names[:index]:
            problem = "twice" if isinstance(name, str) else "in a list of names"
            raise ConfigError(f"{where} has {shown(name)} {problem}, but must name each once")
    return dict.fromkeys(names, 1.0)


def _is_single(value: Any, setting: Setting) -> bool:
    """Returns whether a value is a single element for a setting that is a list."""
    if any(of in (str, Path) for of in hint_options(setting.hint)):
        return False  # one path, where one or several may be given
    if is_dataclass(setting.element):
        return isinstance(value, Mapping)
    return isinstance(value, str if setting.element in (str, Path) else int | float)


def _scalar(text: str, hint: Any) -> Any:
    """The number or truth value that a text represents, if the setting takes one; else the text."""
    options = list(hint_options(hint))
    if str in options or Path in options:
        return text
    if bool in options and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _check_elements(value: Any, element: Any, where: str) -> None:
    """Raises `ConfigError` for a field that the dataclass of a list's elements does not have."""
    if not is_dataclass(element) or not isinstance(value, list):
        return
    known = [field.name for field in fields(element)]
    for of in value:
        for name in of if isinstance(of, Mapping) else ():
            if name not in known:
                hinted = did_you_mean(str(name), known) or f"; there are {', '.join(known)}"
                raise ConfigError(f"{where} has the field {shown(name)}, which does not exist{hinted}")


def _check(value: Any, where: str) -> None:
    """Raises `ConfigError` for whole numbers beyond any setting, for NUL in texts, and for classes to be imported."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise ConfigError(f"{where} is {shown(value)}, but no setting is as large as that")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} is {shown(value)}, but no setting holds a NUL")
    if isinstance(value, Mapping) and not _CLASSES.isdisjoint(value):
        raise ConfigError(f"{where} names a class of Python ({shown(dict(value))}), but recipes hold values only")
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        _check(item, where)
