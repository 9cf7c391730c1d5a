"""One operation that `kernels.py` checks and times, and the arrays that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Case:
    """One operation on one set of arrays.

    Attributes:
      name: label in the output.
      arrays: arguments of the functions.
      functions: implementations by name.
      expected: computes a part of the correct result from the arrays.
      part: extracts that part from an implementation's result.
      flops, num_bytes: least operations to do and bytes to move.
    """

    name: str
    arrays: tuple[Any, ...]
    functions: dict[str, Callable[..., Any]]
    expected: Callable[..., Any]
    part: Callable[[Any], Any]
    flops: float
    num_bytes: float


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale).astype(dtype)
