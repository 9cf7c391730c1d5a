"""Imports other projects' libraries that implement an operation: extras of this package, imported where used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def library(name: str, extra: str) -> ModuleType:
    """Imports a module. Raises NotImplementedError if it is not installed or cannot be imported on this machine."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise NotImplementedError(f"{error.name} is not installed; it comes with the extra {extra!r}") from error
    except (ImportError, OSError) as error:  # from libraries that it loads
        raise NotImplementedError(f"{name} cannot be imported here: {' '.join(str(error).split())}") from error
