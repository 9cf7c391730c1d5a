"""Attention without sinks is attention whose sinks weigh nothing, so no kernel needs a second form."""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Sinks

_WEIGHTLESS = -1e30
"""A logit whose exponential beside any other's is exactly 0; finite, as differences of infinities are NaN."""


def given_or_weightless(sinks: Sinks | None, heads: int) -> Sinks:
    """The sinks of `heads` query heads, or for None such that leave the softmax as it is without them."""
    return jnp.full(heads, _WEIGHTLESS, jnp.float32) if sinks is None else sinks
