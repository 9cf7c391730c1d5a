"""How XLA schedules programs that run many layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any, Generic, TypeVar

import jax

R = TypeVar("R")


def compiler_options() -> dict[str, bool | str]:
    """Options of `jax.jit` for a program that runs many layers.

    On CPUs, XLA would otherwise run what does not depend on the previous layer as early as it can: casts of all layers'
    weights, and what rematerialisation recomputes, all of which would then be held at once.
    """
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else {}


class LayersProgram(Generic[R]):
    """A function jitted with `compiler_options`, at its first call because the options depend on the platform.

    Attributes:
      function: the function itself.
    """

    def __init__(self, function: Callable[..., R], **options: Any) -> None:
        self.function, self._options = function, options
        update_wrapper(self, function)

    @cached_property
    def _jitted(self) -> Any:
        return jax.jit(self.function, compiler_options=compiler_options(), **self._options)

    def __call__(self, *args: Any, **kwargs: Any) -> R:
        return self._jitted(*args, **kwargs)

    def clear_cache(self) -> None:
        self._jitted.clear_cache()

    def _cache_size(self) -> int:
        return self._jitted._cache_size()


def jit_layers(**options: Any) -> Callable[[Callable[..., R]], LayersProgram[R]]:
    """A decorator that makes a function a `LayersProgram`; options are those of `jax.jit`."""
    return lambda function: LayersProgram(function, **options)
