"""Dataclasses as JSON values and back, checked against their annotations.

msgspec does the conversion; this module rewords its errors like the package's own: one sentence that names the file and
the field. Fields that a dataclass does not have are ignored, so that later versions may add some, or refused in files
that people write by hand (`exact`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import read_json

T = TypeVar("T")

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "null": "null",
    "object": "an object",
    "array": "a list",
}


def to_plain(value: Any) -> Any:
    """The JSON value of dataclasses, mappings, sequences, paths and NumPy scalars, nested to any depth."""
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_encode)


def from_plain(
    kind: type[T], value: Any, where: str, error: type[PuzzleError] = PuzzleError, *, exact: bool = False
) -> T:
    """The inverse of `to_plain`.

    Args:
      kind: a dataclass, or any other type that annotations can name ("tuple[Trace, ...]").
      value: a JSON value.
      where: origin of the value, with which error messages begin ("costs.json").
      error: exception to raise where the value does not fit the annotations, or a dataclass itself rejects it.
      exact: whether to refuse fields that a dataclass does not have.
    """
    for problem in _unknown(kind, value) if exact else ():
        raise error(f"{where}: {problem}")
    try:
        return msgspec.convert(value, kind, str_keys=True, dec_hook=_decode)
    except msgspec.ValidationError as problem:
        raise error(f"{where}: {_sentence(str(problem))}") from None
    except PuzzleError as problem:  # from the `__post_init__` of a dataclass
        raise error(f"{where}: {problem}") from None


def read(kind: type[T], path: Path, error: type[PuzzleError] = PuzzleError) -> T:
    """Reads a value from a JSON file; raises `error`, naming the file, where it cannot be read or does not fit."""
    return from_plain(kind, read_json(path, error), str(path), error)


def _encode(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _decode(kind: type, value: Any) -> Any:
    return value if kind is object else kind(value)


def _unknown(kind: object, value: object, place: str = "") -> Iterator[str]:
    """A sentence for each field in a JSON value that its dataclass does not have."""
    if is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        for name, part in value.items():
            if name in hints:
                yield from _unknown(hints[name], part, f"{place}{name}.")
            else:
                yield f"{place}{name} does not exist; there are {', '.join(hints)}"
        return
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    for inner in get_args(kind) if not isinstance(value, str) else ():
        for part in parts:
            yield from _unknown(inner, part, place)


def _sentence(problem: str) -> str:
    """An msgspec message ("Expected `int`, got `str` - at `$.layers[0].count`") in this package's wording."""
    message, _, place = problem.partition(" - at ")
    field = re.sub(r"`|\$\.?", "", place) or "the value"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", message):
        return f"{field} has no field {missing[1]!r}"
    if expected := re.fullmatch(r"Expected `(.*)`, got `(.*)`", message):
        wanted, found = (
            " or ".join(_KINDS.get(kind, kind) for kind in kinds.replace("int | float", "float").split(" | "))
            for kinds in expected.groups()
        )
        return f"{field} is {found}, but must be {wanted}"
    return f"{field}: {message}" if place else message
