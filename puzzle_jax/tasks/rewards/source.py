"""The file of a user's reward function, `path/to/file.py:name` or `package.module:name`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

from puzzle_jax.errors import ConfigError


def reward_file(function: str) -> Path | None:
    """The file of a user's function, found without importing anything; None if a module has none.

    For a module within packages, the file is looked for in the packages' directories.
    """
    where = function.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    top, *inner = where.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for depth in range(len(inner)):
            if spec is None:
                return None
            name = ".".join([top, *inner[: depth + 1]])
            spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def reward_source(function: str | None) -> bytes | None:
    """The content of the function's file; None for a module."""
    if function is None:
        return None
    where, _, name = function.rpartition(":")
    is_file = where.endswith(".py")
    if not name.isidentifier() or not (is_file or all(part.isidentifier() for part in where.split("."))):
        raise ConfigError(f"reward is {function!r}, but must be path/to/file.py:name or package.module:name")
    if not is_file:
        return None
    try:
        return Path(where).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"reward is {function!r}, but {where} cannot be read: {why}") from None
