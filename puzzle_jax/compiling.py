"""Seconds that this process has spent on tracing, lowering and compiling programs, as JAX reports them."""

from __future__ import annotations

from functools import cache
from typing import Any

_EVENTS = frozenset(
    f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile")
)


class _Seconds:
    """A listener to JAX's own measurements."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _EVENTS:
            self.total += duration_secs


@cache
def _seconds() -> _Seconds:
    import jax

    listener = _Seconds()
    jax.monitoring.register_event_duration_secs_listener(listener)
    return listener


def compile_seconds() -> float:
    """Seconds of compiling since this was first called; two calls differ by the seconds spent between them."""
    return _seconds().total
