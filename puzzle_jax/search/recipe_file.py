"""What is wrong with a recipe before its values are looked at: the file, its sections, and values that are left empty.

The parser of the command line takes some of this for granted, and answers with a traceback, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml

from puzzle_jax.errors import ConfigError


def recipe_paths(arguments: Sequence[str]) -> Iterator[Path]:
    """The files that a command line names by `--recipe`."""
    for index, argument in enumerate(arguments):
        if argument.startswith("--recipe="):
            yield Path(argument.partition("=")[2])
        elif argument == "--recipe":
            yield from map(Path, arguments[index + 1 : index + 2])


def check_file(path: Path) -> None:
    """Raises `ConfigError`, naming the file, where it cannot be read or holds no mapping, or a field twice."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} holds {data!r}, but must hold the fields of a recipe")
    for name in data:
        if not isinstance(name, str):
            raise ConfigError(f"recipe {path} has a field {name!r}, but fields have names")


def check_sections(settings: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Checks parsed settings, by name, of a dataclass that holds others.

    Raises `ConfigError` that names a section which is no mapping, or a field that is null but may not be.
    """
    for name, hint in get_type_hints(kind).items():
        value = settings.get(name)
        if is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is {value!r}, but must be a mapping of its fields")
            check_sections(value, hint, f"{prefix}{name}.")
        elif value is None and NoneType not in get_args(hint):
            raise ConfigError(f"{prefix}{name} is None, but must have a value")


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice; YAML's own would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)
