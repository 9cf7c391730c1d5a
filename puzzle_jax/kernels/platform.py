"""The platform that kernels are chosen for: that of the device present, or one that a program is lowered for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

PLATFORMS = ("cpu", "gpu", "tpu")

_target: ContextVar[str | None] = ContextVar("target", default=None)


def target_platform() -> str:
    """The platform that kernels are chosen for: "cpu", "gpu" or "tpu"."""
    return _target.get() or jax.default_backend()


def lowered_for() -> str | None:
    """The platform of `lowering_for`, where that is in force."""
    return _target.get()


@contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """A context in which kernels are chosen for a platform that need not be present ("gpu" is a Hopper one), so that
    programs can be lowered and compiled for it ahead of time. Programs traced before keep their kernels.

    Raises ValueError for a platform that is unknown.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform is {platform!r}, but must be one of {', '.join(PLATFORMS)}")
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def is_hopper() -> bool:
    """Whether kernels are chosen for a GPU of compute capability 9.0."""
    if _target.get() is not None:
        return _target.get() == "gpu"
    return jax.default_backend() == "gpu" and str(getattr(jax.local_devices()[0], "compute_capability", "")) == "9.0"
