"""Picks the implementation of an operation.

An api offers an ordered mapping of implementations. The first that accepts the arguments serves; one that cannot
raises NotImplementedError, and only that is caught. A pinned implementation never falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Result = TypeVar("Result")


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Result]],
    implementation: str | None,
    *args: object,
    **kwargs: object,
) -> Result:
    """Calls the first of `implementations` that accepts the arguments, or the one named `implementation`.

    Raises:
      ValueError: `implementation` is not among the names.
      NotImplementedError: none accepts the arguments, or the named one does not; the message says why each refused.
    """
    if implementation is not None:
        if implementation not in implementations:
            names = ", ".join(implementations)
            raise ValueError(f"{operation} has no implementation {implementation!r}; known: {names}")
        try:
            return implementations[implementation](*args, **kwargs)
        except NotImplementedError as refusal:
            raise NotImplementedError(f"{implementation} of {operation} was asked for: {refusal}") from refusal
    refusals = []
    for name, function in implementations.items():
        try:
            return function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f"no implementation of {operation} fits: " + "; ".join(refusals))
