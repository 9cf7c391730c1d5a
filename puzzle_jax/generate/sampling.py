"""One token per row from logits: greedy, or sampled at a temperature from the smallest set of tokens that hold a
share `top_p` of the probability (nucleus sampling, arXiv 1904.09751).

A row's noise depends on its own seed and on how many tokens it has drawn, never on other rows.
Left out: top-k, penalties, beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.errors import ConfigError
from puzzle_jax.temperature import LEAST_TEMPERATURE, check_temperature

_LEAST_SHARE = 1e-30  # which float32 does not take for 0; the likeliest token alone either way


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw of tokens.

    Attributes:
      temperature: divides the logits; 0 is greedy. Below `LEAST_TEMPERATURE`, where float32 cannot divide by it, it is
        taken to be 0.
      top_p: share of the probability that is drawn from, above 0; 1 is all of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_temperature("temperature", self.temperature)
        if self.temperature < LEAST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
        object.__setattr__(self, "top_p", max(self.top_p, _LEAST_SHARE))


def sample(
    logits: Float[Array, "batch vocab"],
    seeds: Int[Array, "batch"],
    drawn: Int[Array, "batch"],
    temperature: float | Float[Array, ""],
    top_p: float,
) -> Int[Array, "batch"]:
    """One token per row; the noise of a row follows from its seed and the tokens that it has drawn before.

    Args are those of `Sampling`. The temperature may be an array, so that one program serves them all, 0 too.
    """

    def noise(seed: Array, count: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), logits.shape[-1:])

    def noisy() -> Array:
        scaled = logits / temperature
        if top_p < 1.0:
            scaled = jnp.where(in_nucleus(scaled, top_p), scaled, -jnp.inf)
        return scaled + jax.vmap(noise)(seeds, drawn)

    # Greedy answers do not pay for noise.
    return jnp.argmax(jax.lax.cond(temperature > 0, noisy, lambda: logits), axis=-1).astype(jnp.int32)


def in_nucleus(logits: Float[Array, "batch vocab"], top_p: float) -> Array:
    """True for tokens that are drawn from: the likeliest whose likelier ones hold less than `top_p`, with ties."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return probabilities >= least
