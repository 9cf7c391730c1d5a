"""Checks the shapes and types of every call of the package by jaxtyping and beartype.

jaxtyping's import hook makes the checks of a function when its module is imported, which takes ten seconds in a process
that runs tests, mostly for functions that are never called there. So checks are made at a function's first call. Where
no annotation has an array, there are no shapes to remember, and beartype alone checks the function. A nested function
is a new one whenever the outer one runs; all that have the same code share their checks.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
import typing
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, PyTree, install_import_hook

_jaxtyped = jaxtyping.jaxtyped
_of_code: dict[types.CodeType, Callable] = {}


def install(package: str) -> None:
    """Checks all functions and dataclasses of modules of `package` that are imported from now on."""
    jaxtyping.jaxtyped = from_the_first_call
    install_import_hook(package, "beartype.beartype")


def from_the_first_call(of: Any = None, *, typechecker: Callable) -> Any:
    """The decorator that the import hook puts above every function and class in place of `jaxtyping.jaxtyped`."""
    if of is None:
        return functools.partial(from_the_first_call, typechecker=typechecker)
    if inspect.isclass(of):
        made = vars(of).get("__init__")
        if "__dataclass_fields__" in vars(of) and isinstance(made, types.FunctionType):
            of.__init__ = _lazily(made, typechecker)
        return of
    if isinstance(of, types.FunctionType):
        return _lazily(of, typechecker)
    return _jaxtyped(of, typechecker=typechecker)


def _lazily(function: Callable, typechecker: Callable) -> Callable:
    checked = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal checked
        if checked is None:
            checked = _checked(function, typechecker)
        return checked(*args, **kwargs)

    return call


def _checked(function: Callable, typechecker: Callable) -> Callable:
    if "<locals>" not in function.__qualname__ or inspect.isgeneratorfunction(function):
        return _with_checks(function, typechecker)
    code = function.__code__
    if code not in _of_code:
        _of_code[code] = _of_any(function, typechecker)
    return functools.partial(_of_code[code], function)


def _of_any(function: types.FunctionType, typechecker: Callable) -> Callable:
    """Returns call(function, *arguments), which calls any function that has this one's code, with its checks."""
    waiting = threading.local()

    # A copy without captured values, which would otherwise live as long as the checks.
    cells = tuple(types.CellType() for _ in function.__code__.co_freevars)
    alike = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    alike.__kwdefaults__ = function.__kwdefaults__

    @functools.wraps(functools.update_wrapper(alike, function))
    def enter(*args, **kwargs):
        return waiting.functions.pop()(*args, **kwargs)

    alike.__dict__.pop("__wrapped__")
    checked = _with_checks(enter, typechecker)

    def call(function: Callable, *args, **kwargs):
        functions = vars(waiting).setdefault("functions", [])
        depth = len(functions)
        functions.append(function)
        try:
            return checked(*args, **kwargs)
        finally:
            del functions[depth:]  # a refused call has not popped its function

    return call


def _with_checks(function: Callable, typechecker: Callable) -> Callable:
    if not _has_arrays(function):
        with contextlib.suppress(Exception):  # a hint that refers to itself, which jaxtyping accepts for any value
            return beartype(function)
    return _jaxtyped(function, typechecker=typechecker)


def _has_arrays(function: Callable) -> bool:
    """Returns whether an annotation has arrays, or cannot be resolved; jaxtyping ignores the latter."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception:
        return True
    return any(map(_of_arrays, hints.values()))


def _of_arrays(hint: object) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray | PyTree):
        return True
    return any(map(_of_arrays, typing.get_args(hint)))
