"""Argument checks that all operations share, made before anything is traced further or launched.

Each raises a ValueError that names the argument, its shape, and the shape that it had to fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Window


def shapes(needed_by: str, expected: Mapping[str, tuple[Array, tuple[int, ...]]]) -> None:
    """Checks that each named array has its expected shape; `needed_by` is what messages say needs that shape."""
    for name, (array, shape) in expected.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, but {needed_by} needs {shape}")


def floating(**arrays: Array) -> None:
    """Checks that arrays hold floating point numbers."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}, but must be floating point")


def cached(**arrays: Array) -> None:
    """Checks that caches hold floating point numbers or bytes of e4m3."""
    for name, array in arrays.items():
        if array.dtype != jnp.uint8 and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}, but must be floating point, or uint8 for e4m3")


def heads(q: Array, q_heads: int, k_name: str, k: Array, kv_heads: int) -> None:
    """Checks that query heads share key-value heads evenly."""
    if not kv_heads or q_heads % kv_heads:
        raise ValueError(
            f"q of shape {q.shape} has {q_heads} heads, which is no multiple of the {kv_heads} of {k_name} of shape "
            f"{k.shape}"
        )


def window(window: Window, batch: int) -> None:
    """Checks that a window is None for all keys, at least 1, or an array of integers, for all rows or for each row."""
    if window is None:
        return
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window is {window}, but must be at least 1, or None for all keys")
        return
    if math.prod(window.shape) not in (1, batch) or not jnp.issubdtype(window.dtype, jnp.integer):
        raise ValueError(f"window has shape {window.shape} and dtype {window.dtype}, but must be {batch} whole numbers")
