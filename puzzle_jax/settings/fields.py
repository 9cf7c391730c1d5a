"""The settings of a nested dataclass by dotted name, with their descriptions from its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_ENTRY = re.compile(r"^  (\w[\w, ]*):[ \n]*(.*(?:\n    .*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """One field of a settings dataclass, or one section: a field that is a dataclass itself.

    Attributes:
      name: dotted name, the field's after those of its sections.
      hint: its type.
      default: its default; MISSING if a value must be given.
      help: its description in the docstring of the dataclass.
      read: for a field with a form of its own, from its metadata: turns the given value, and its name for messages,
        into a value of the type.
    """

    name: str
    hint: Any
    default: Any
    help: str
    read: Callable[[Any, str], Any] | None

    @property
    def section(self) -> type | None:
        """The dataclass, if this is a section."""
        return self.hint if is_dataclass(self.hint) and isinstance(self.hint, type) else None

    @property
    def mapping(self) -> tuple[Any, ...] | None:
        """The types of keys and values, if this is a mapping."""
        return next((get_args(of) for of in hint_options(self.hint) if get_origin(of) in (dict, Mapping)), None)

    @property
    def of_weights(self) -> bool:
        """Returns whether it is a mapping of names to weights, and nothing else."""
        return self.mapping is not None and self.mapping[1] is float and not self.is_scalar

    @property
    def is_scalar(self) -> bool:
        """Returns whether a single number may be given."""
        return any(of in (int, float) for of in hint_options(self.hint))

    @property
    def element(self) -> Any:
        """The type of a list's elements; None if this is no list."""
        lists = [of for of in hint_options(self.hint) if get_origin(of) in (tuple, list, Sequence)]
        return next((of for of in get_args(lists[0]) if of is not Ellipsis), None) if lists else None

    @property
    def is_text(self) -> bool:
        return all(of in (str, Path, NoneType) for of in hint_options(self.hint))

    @property
    def of_paths(self) -> bool:
        """Returns whether it is a path, a list of paths, or a mapping to paths."""
        inner = (self.element, *(self.mapping or ())[1:])
        return any(of is Path for of in (*hint_options(self.hint), *inner))

    @property
    def is_flag(self) -> bool:
        return bool in hint_options(self.hint)

    @property
    def choices(self) -> list[str]:
        """The words that may be given, if the type enumerates them."""
        words = (get_args(of) for of in hint_options(self.hint) if get_origin(of) is Literal)
        return [str(word) for of in words for word in of]

    @property
    def may_be_null(self) -> bool:
        return NoneType in hint_options(self.hint)


def settings_of(kind: type, prefix: str = "", default: Any = MISSING) -> dict[str, Setting]:
    """All settings of a dataclass by dotted name, each section before the fields in it.

    `prefix` names the enclosing sections; the values of an instance, `default`, replace the dataclass's own defaults.
    """
    found: dict[str, Setting] = {}
    hints, texts = get_type_hints(kind), _descriptions(kind)
    for field in fields(kind):
        name, value = f"{prefix}{field.name}", _default(field) if default is MISSING else getattr(default, field.name)
        setting = Setting(name, hints[field.name], value, texts.get(field.name, ""), field.metadata.get("read"))
        found[name] = setting
        if setting.section is not None:
            found |= settings_of(setting.section, f"{name}.", value)
    return found


def hint_options(hint: Any) -> Iterator[Any]:
    """The types of a union, or the one type."""
    if get_origin(hint) in (Union, UnionType):
        for option in get_args(hint):
            yield from hint_options(option)
    else:
        yield hint


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _descriptions(kind: type) -> dict[str, str]:
    """Descriptions of attributes in the docstrings of a dataclass and its bases."""
    found: dict[str, str] = {}
    for of in reversed(kind.__mro__):
        _, _, attributes = inspect.cleandoc(of.__doc__ or "").partition("\nAttributes:\n")
        for names, text in _ENTRY.findall(attributes):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
