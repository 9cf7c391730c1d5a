"""The platform that kernels are chosen for: that of the device present, or one that a program is lowered for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

PLATFORMS = ("cpu", "gpu", "tpu")

HOPPER = "9.0"
"""Compute capability of an H100 or H200."""

_target: ContextVar[tuple[str, str] | None] = ContextVar("target", default=None)


def target_platform() -> str:
    """The platform that kernels are chosen for: "cpu", "gpu" or "tpu"."""
    return lowered_for() or jax.default_backend()


def lowered_for() -> str | None:
    """The platform given to `lowering_for`, or None outside its context."""
    target = _target.get()
    return None if target is None else target[0]


@contextmanager
def lowering_for(platform: str, capability: str = HOPPER) -> Iterator[None]:
    """A context in which kernels are chosen for a platform that need not be present, so that programs can be lowered
    and compiled for it ahead of time. Programs traced earlier keep their kernels.

    Args:
      platform: one of `PLATFORMS`.
      capability: compute capability of a GPU.

    Raises ValueError for an unknown platform.
    """
    if platform not in PLATFORMS:
        raise ValueError(f"platform is {platform!r}, but must be one of {', '.join(PLATFORMS)}")
    token = _target.set((platform, capability))
    try:
        yield
    finally:
        _target.reset(token)


def is_hopper() -> bool:
    """Returns whether kernels are chosen for a GPU of compute capability 9.0."""
    target = _target.get()
    if target is not None:
        return target == ("gpu", HOPPER)
    return jax.default_backend() == "gpu" and str(getattr(jax.local_devices()[0], "compute_capability", "")) == HOPPER
