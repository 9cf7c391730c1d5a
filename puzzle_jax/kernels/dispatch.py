"""Picks the implementation of an operation.

An api passes an ordered mapping of implementations. The first that accepts the arguments is used; one that does not
raises NotImplementedError, and only that is caught. Kernels are used only where they have passed their trial
(`self_check`), other projects' libraries only by name. A pinned implementation is neither checked nor replaced.
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
    """The implementation chosen for one call of an operation, and why each one before it in the order refused."""

    operation: str
    chosen: str
    refusals: dict[str, str]


_choices: ContextVar[list[Choice] | None] = ContextVar("choices", default=None)


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """A context that records the choices made in it."""
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
      trial: makes the trial that kernels must pass before they are used; without one they are used only by name.

    Raises:
      ValueError: `implementation` is not among the names.
      NotImplementedError: none accepts the arguments, or the named one does not; the message says why each refused.
      ConfigError: PUZZLE_KERNELS has an invalid value.
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
