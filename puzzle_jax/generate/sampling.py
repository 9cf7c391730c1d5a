"""One token per row from logits: greedy, or sampled at a temperature from the smallest set of tokens that holds a
share `top_p` of the probability (nucleus sampling, arXiv 1904.09751).

A token is drawn by inverting the cumulative distribution. A large vocabulary is a tree of blocks of 128: a block is
drawn by its mass, then a token within it, each with a random number of its own, so that float32 resolves rare tokens.
That takes one random number per row and level; noise on every logit (the Gumbel-max trick) takes one per token, which
cost a fifth of a decoding step of a small model on a CPU.

A row's random numbers depend on its own seed and on how many tokens it has drawn, never on other rows.
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

BLOCK = 128  # tokens, or blocks of the level below, in a block
_LEAST_SHARE = 1e-30  # not 0 in float32; leaves only the likeliest token, as any smaller one would


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Attributes:
      temperature: divisor of the logits; 0 means greedy, and so does any value below `LEAST_TEMPERATURE`, by which
        float32 cannot divide.
      top_p: share of the probability that is sampled from, above 0; 1 means all of it.
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
    """Draws one token per row; its random numbers depend on its seed and on how many tokens it has drawn.

    For temperature and top_p, see `Sampling`. The temperature may be an array, so that one program serves all, 0 too.
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
    """Number of levels of the tree over `choices` tokens."""
    return 1 if choices <= BLOCK else 1 + levels(-(-choices // BLOCK))


def inverse_draw(weights: Float[Array, "batch choices"], numbers: Float[Array, "batch levels"]) -> Int[Array, "batch"]:
    """Draws an index per row with probability proportional to its weight; never one whose weight is 0.

    Args:
      weights: non-negative, with at least one above 0 in every row.
      numbers: random numbers from 0 to below 1, one for each of `levels(choices)`.
    """
    batch, choices = weights.shape
    if choices <= BLOCK:
        return _first_beyond(weights, numbers[:, 0])
    blocks = jnp.pad(weights, ((0, 0), (0, -choices % BLOCK))).reshape(batch, -1, BLOCK)
    block = inverse_draw(jnp.sum(blocks, axis=-1), numbers[:, 1:])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_beyond(inside, numbers[:, 0])


def _first_beyond(weights: Float[Array, "batch choices"], numbers: Float[Array, "batch"]) -> Int[Array, "batch"]:
    """The first index at which the cumulative sum of a row's weights exceeds the row's share of their total."""
    # A product with a triangle is the fastest cumulative sum of few numbers, and a row's does not depend on others.
    triangle = jnp.triu(jnp.ones((weights.shape[1],) * 2, weights.dtype))
    cumulative = jnp.matmul(weights, triangle, precision=jax.lax.Precision.HIGHEST)
    beyond = (cumulative > numbers[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.argmax(beyond, axis=-1).astype(jnp.int32)


def in_nucleus(logits: Float[Array, "batch vocab"], top_p: float) -> Array:
    """True for tokens to draw from: those whose likelier tokens hold less than `top_p` in total, ties included."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    falling = -jnp.sort(-probabilities, axis=-1)
    before = jnp.cumsum(falling, axis=-1) - falling
    least = jnp.min(jnp.where(before < top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return probabilities >= least
