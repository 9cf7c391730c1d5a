"""Rotary position embedding with YaRN scaling (arXiv 2309.00071), as gpt-oss uses it.

The two halves are rotated against each other (dimension i with i + dim / 2). Frequencies that turn often within the
original context are kept, those that turn less than once are divided by the factor, and a linear ramp joins them; with
`truncate` off, the ramp's bounds stay fractional.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from puzzle_jax.config import RopeConfig
from puzzle_jax.kernels.platform import target_platform


class RopeTable(NamedTuple):
    """Cosine and sine of given positions, scaled by YaRN's magnitude; float32."""

    cos: Float[Array, "*batch seq half"]
    sin: Float[Array, "*batch seq half"]


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, [head_dim / 2], float64."""
    half = head_dim // 2
    period = rope.theta ** (np.arange(half) * 2.0 / head_dim)
    if rope.factor == 1.0:
        return 1.0 / period

    def dimension_of(rotations: float) -> float:
        return head_dim / 2 * math.log(rope.original_context / (rotations * 2 * math.pi)) / math.log(rope.theta)

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    # Bounds outside the head may be in the wrong order, which reverses the ramp; every runtime does the same.
    ramp = np.clip((np.arange(half) - low) / (high - low or 1e-3), 0.0, 1.0)
    return ramp / (rope.factor * period) + (1.0 - ramp) / period


def rope_table(rope: RopeConfig, head_dim: int, positions: Int[Array, "*batch seq"]) -> RopeTable:
    """Cosines and sines at `positions`.

    On CPUs XLA fuses them into the rotation and so recomputes them for every head, element and layer, which took a
    third of a layer's prefill. A matrix product ends the fusion; one with a diagonal is bit-identical to the scaling.
    """
    frequencies = jnp.asarray(inverse_frequencies(rope, head_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if target_platform() != "cpu":
        return RopeTable(cos * rope.magnitude, sin * rope.magnitude)
    scaling = jnp.eye(len(frequencies), dtype=jnp.float32) * rope.magnitude
    return RopeTable(*(jnp.matmul(x, scaling, precision=jax.lax.Precision.HIGHEST) for x in (cos, sin)))


def rotate(x: Float[Array, "batch seq heads dim"], table: RopeTable) -> Float[Array, "batch seq heads dim"]:
    """Rotates queries or keys; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = table.cos[..., None, :], table.sin[..., None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
