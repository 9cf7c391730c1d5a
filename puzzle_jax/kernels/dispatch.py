"""Picks the implementation of an operation.

An api offers an ordered mapping of implementations. The first that accepts the arguments serves; one that cannot
raises NotImplementedError, and only that is caught. Kernels serve only where they have proved themselves
(`self_check`), other projects' libraries by name only. A pinned implementation is neither checked nor replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from puzzle_jax.kernels import self_check
from puzzle_jax.kernels.self_check import Trial

Result = TypeVar("Result")


class Choice(NamedTuple):
    """What serves one call of an operation, and why those before it in the order do not."""

    operation: str
    chosen: str
    refusals: dict[str, str]


_choices: ContextVar[list[Choice] | None] = ContextVar("choices", default=None)


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """A context that lists the choices made in it."""
    choices: list[Choice] = []
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def dispatch(
    operation: str,
    implementations: Mapping[str, Callable[..., Result]],
    implementation: str | None,
    *args: object,
    trial: Callable[[], Trial] | None = None,
    **kwargs: object,
) -> Result:
    """Calls the first of `implementations` that accepts the arguments, or the one named `implementation`.

    Args:
      trial: makes what kernels are checked by before they serve; without one they serve by name only.

    Raises:
      ValueError: `implementation` is not among the names.
      NotImplementedError: none accepts the arguments, or the named one does not; the message says why each refused.
      ConfigError: PUZZLE_KERNELS is not what it may be.
    """
    if implementation is not None:
        if implementation not in implementations:
            names = ", ".join(implementations)
            raise ValueError(f"{operation} has no implementation {implementation!r}; known: {names}")
        try:
            return implementations[implementation](*args, **kwargs)
        except NotImplementedError as refusal:
            raise NotImplementedError(f"{implementation} of {operation} was asked for: {refusal}") from refusal
    refusals: dict[str, str] = {}
    for name, function in implementations.items():
        try:
            if name in self_check.KERNELS or name in self_check.LIBRARIES:
                self_check.admit(operation, name, trial)
            result = function(*args, **kwargs)
        except NotImplementedError as refusal:
            refusals[name] = str(refusal)
            continue
        if (choices := _choices.get()) is not None:
            choices.append(Choice(operation, name, refusals))
        return result
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    raise NotImplementedError(f"no implementation of {operation} fits: {reasons}")
