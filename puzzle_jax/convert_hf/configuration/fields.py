"""Fields of a config.json, checked as they are read; every error names file, field, value and rule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json

MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 10_000, 65_536, 2**31 - 1
"""Upper limits for a config.json; a larger number is treated as damage rather than tried."""
MAX_ROTARY = 1e12
"""Upper limit for bases, factors and numbers of rotations of rotary embeddings; its inverse is the lower limit."""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


class Fields:
    """A JSON object in the file `source`; `prefix` is its place in the file."""

    def __init__(self, data: dict[str, Json], source: Path, prefix: str = "") -> None:
        self.data, self.source, self.prefix = data, source, prefix

    def fail(self, name: str, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.prefix}{name} is {shown(self.data.get(name))}, but {rule}")

    def _take(self, name: str, default: Json, accepts: Callable[[Json], bool], rule: str) -> Json:
        """A value, or the default where it is missing; null is refused, since it is no value in transformers either."""
        if name not in self.data:
            if default is not None:
                return default
            raise CheckpointError(f"{self.source}: {self.prefix}{name} is missing, but {rule}")
        if not accepts(self.data[name]):
            raise self.fail(name, rule)
        return self.data[name]

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = MAX_SIZE) -> int:
        def accepts(value: Json) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

        return self._take(name, default, accepts, f"must be a whole number of at least {least} and at most {most}")

    def either(self, name: str, other: str, most: int = MAX_SIZE) -> tuple[list[str], int]:
        """A number that a file may give under either of two names, or under both if they agree; and the names it
        has."""
        names = [each for each in (name, other) if each in self.data]
        values = [self.integer(each, most=most) for each in names or [name]]
        if len(set(values)) > 1:
            raise self.fail(name, f"{other} is {values[1]}; they must be equal")
        return names, values[0]

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._take(name, default, _is_number, "must be a number"))

    def rotary(self, name: str, default: float | None = None) -> float:
        def accepts(value: Json) -> bool:
            return _is_number(value) and 1 / MAX_ROTARY <= value <= MAX_ROTARY

        rule = f"must be a number from {1 / MAX_ROTARY:g} to {MAX_ROTARY:g}"
        return float(self._take(name, default, accepts, rule))

    def boolean(self, name: str, default: bool) -> bool:
        return self._take(name, default, lambda value: isinstance(value, bool), "must be true or false")

    def string(self, name: str) -> str:
        return self._take(name, None, lambda value: isinstance(value, str), "must be a string")

    def list_of(self, name: str, length: int) -> list[Json]:
        rule = f"must be a list with one entry for each of the {length} layers"
        return self._take(name, None, lambda value: isinstance(value, list) and len(value) == length, rule)

    def strings(self, name: str) -> list[str]:
        """A list of strings; empty where it is missing or null."""
        value = self.data.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(entry, str) for entry in value)):
            raise self.fail(name, "must be a list of strings")
        return value or []

    def require(self, values: Mapping[str, Json]) -> None:
        """Raises `CheckpointError` where a field is given and has another than the one supported value."""
        for name, value in values.items():
            if self.data.get(name, value) != value:
                raise self.fail(name, f"only {'null' if value is None else str(value).lower()} is supported")

    def table(self, name: str) -> Fields | None:
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.fail(name, "must be an object")
        return None if value is None else Fields(value, self.source, f"{self.prefix}{name}.")
