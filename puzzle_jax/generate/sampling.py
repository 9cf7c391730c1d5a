"""One token per row from logits: greedy, or sampled at a temperature from the smallest set of tokens that hold a
share `top_p` of the probability (nucleus sampling, arXiv 1904.09751).

A token is drawn by the inverse of the cumulative distribution. A large vocabulary is a tree of blocks of 128: a block
is drawn by its mass, then a token within it, each with a number of its own, so that float32 resolves what is rare. That
is one random number per row and level; noise on every logit (the Gumbel-max trick) is one per token, which took a fifth
of a decoding step of a small model on a CPU.

A row's numbers depend on its own seed and on how many tokens it has drawn, never on other rows.
Left out: top-k, penalties, beams.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.errors import ConfigError
from puzzle_jax.temperature import LEAST_TEMPERATURE, check_temperature

BLOCK = 128  # tokens, or blocks of them, of one level
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
    """One token per row; its random numbers follow from its seed and the tokens that it has drawn before.

    Args are those of `Sampling`. The temperature may be an array, so that one program serves them all, 0 too.
    """

    def drawn_token() -> Array:
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        if top_p < 1.0:
            scaled = jnp.where(in_nucleus(scaled, top_p), scaled, -jnp.inf)
        return inverse_draw(jnp.exp(scaled), jax.vmap(partial(_uniform, levels(logits.shape[-1])))(seeds, drawn))

    # Greedy answers do not pay for random numbers.
    return jax.lax.cond(temperature > 0, drawn_token, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _uniform(count: int, seed: Array, drawn: Array) -> Array:
    """`count` numbers between 0 and 1 for the next token of a request."""
    numbers = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), drawn), (count,))
    # They are multiples of 2^-23. A 0 would draw the first token that has any weight, however small.
    return jnp.maximum(numbers, 2.0**-24)


def levels(choices: int) -> int:
    """Levels of the tree over so many tokens."""
    return 1 if choices <= BLOCK else 1 + levels(-(-choices // BLOCK))


def inverse_draw(weights: Float[Array, "batch choices"], numbers: Float[Array, "batch levels"]) -> Int[Array, "batch"]:
    """An index per row with probability in proportion to its weight; never one whose weight is 0.

    Args:
      weights: at least 0, and in every row one is above.
      numbers: from 0 to below 1, one for each of `levels(choices)`.
    """
    batch, choices = weights.shape
    if choices <= BLOCK:
        return _first_beyond(weights, numbers[:, 0])
    blocks = jnp.pad(weights, ((0, 0), (0, -choices % BLOCK))).reshape(batch, -1, BLOCK)
    block = inverse_draw(jnp.sum(blocks, axis=-1), numbers[:, 1:])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_beyond(inside, numbers[:, 0])


def _first_beyond(weights: Float[Array, "batch choices"], numbers: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """The first index at which the cumulative sum of a row's weights is beyond that share of all of them."""
    # A product with a triangle is the fastest sum of few numbers, and every row's is the same beside any others.
    triangle = jnp.triu(jnp.ones((weights.shape[1],) * 2, weights.dtype))
    cumulative = jnp.matmul(weights, triangle, precision=jax.lax.Precision.HIGHEST)
    beyond = (cumulative > numbers[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.argmax(beyond, axis=-1).astype(jnp.int32)


def in_nucleus(logits: Float[Array, "batch vocab"], top_p: float) -> Array:
    """True for tokens that are drawn from: the likeliest whose likelier ones hold less than `top_p`, with ties."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return probabilities >= least
