"""Logits one piece at a time: some tokens by some columns of an output head, never [tokens, vocab].

Tokens are split into equal groups, and a head is processed in slices of its columns. No head is padded or copied:
the last slice ends with the vocabulary and overlaps the one before, and columns already seen are masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

MASKED = -1e30  # the logit of a masked column; finite, so that differences of two of them are 0 and not NaN

Carry = TypeVar("Carry")


class Head(NamedTuple):
    """A model's last norm and output head."""

    norm: Float[Array, "hidden"]
    weight: Float[Array, "hidden vocab"]


class Chunk(NamedTuple):
    """One group of tokens by one slice of the vocabulary.

    Attributes:
      start: the slice's first column.
      first_new: the first column that no earlier slice had.
      logits: per model, float32 logits divided by the temperature, [tokens, columns]; masked before `first_new`.
    """

    start: Array
    first_new: Array
    logits: tuple[Array, ...]

    def columns(self) -> Array:
        """Ids of the columns, -1 for masked ones; [columns]."""
        ids = self.start + jnp.arange(self.logits[0].shape[1])
        return jnp.where(ids >= self.first_new, ids, -1)

    def place(self, ids: Array) -> Array:
        """Column of each id within the slice; the number of columns, one past the last, if no new column has it."""
        width = self.logits[0].shape[1]
        here = (ids >= self.first_new) & (ids < self.start + width)
        return jnp.where(here, ids - self.start, width)

    def pick(self, ids: Array, otherwise: Array) -> Array:
        """The first model's logits of `ids` [tokens, k] where this slice has them, `otherwise` elsewhere."""
        place = self.place(ids)
        width = self.logits[0].shape[1]
        found = jnp.take_along_axis(self.logits[0], jnp.minimum(place, width - 1), axis=1)
        return jnp.where(place < width, found, otherwise)


def split(array: Shaped[Array, "tokens ..."], groups: int) -> Shaped[Array, "groups group ..."]:
    """Token t goes to group t mod `groups`; short groups are padded with zeros.

    If the token axis is sharded in blocks, each group then holds equally many tokens of every device, and devices share
    the work of each group; groups of neighbouring tokens would lie on one device each.
    """
    each = -(-array.shape[0] // groups)
    padded = jnp.pad(array, [(0, each * groups - array.shape[0]), *[(0, 0)] * (array.ndim - 1)])
    return jnp.swapaxes(padded.reshape(each, groups, *array.shape[1:]), 0, 1)


def gather(split: Shaped[Array, "groups group ..."], tokens: int) -> Shaped[Array, "tokens ..."]:
    """The inverse of `split`."""
    return jnp.swapaxes(split, 0, 1).reshape(-1, *split.shape[2:])[:tokens]


def sweep(
    step: Callable[[Carry, Chunk], Carry],
    start: Carry,
    models: tuple[tuple[Float[Array, "tokens _"], Float[Array, "_ vocab"]], ...],
    *,
    temperature: float,
    width: int,
) -> Carry:
    """Folds `step` over the slices of the vocabulary.

    Args:
      step: (carry, chunk) -> carry.
      start: the initial carry.
      models: normalised states and head weight of each model; logits are computed in the states' dtype and
        accumulated in float32, as `network.head_logits` does.
      temperature: divides the logits.
      width: columns per slice.
    """
    vocab = models[0][1].shape[1]
    width = min(width, vocab)

    def body(carry: Carry, index: Array) -> tuple[Carry, None]:
        first_new = index * width
        begin = jnp.minimum(first_new, vocab - width)
        seen = begin + jnp.arange(width) < first_new
        logits = []
        for y, weight in models:
            z = jnp.matmul(y, columns_of(weight, begin, width, y.dtype), preferred_element_type=jnp.float32)
            logits.append(jnp.where(seen, MASKED, z / temperature))
        return step(carry, Chunk(begin, first_new, tuple(logits))), None

    return jax.lax.scan(body, start, jnp.arange(-(-vocab // width)))[0]


def columns_of(weight: Array, start: Array, width: int, dtype: DTypeLike) -> Array:
    return jax.lax.dynamic_slice_in_dim(weight, start, width, axis=1).astype(dtype)


class LogSumExp(NamedTuple):
    """log sum exp over the columns seen so far, per token."""

    largest: Array
    total: Array  # sum of exp(logit - largest)

    @classmethod
    def empty(cls, tokens: int) -> LogSumExp:
        return cls(jnp.full(tokens, MASKED, jnp.float32), jnp.zeros(tokens, jnp.float32))

    def add(self, logits: Array) -> LogSumExp:
        """Adds the logits of another slice, [tokens, columns]."""
        largest = jnp.maximum(self.largest, jnp.max(logits, axis=-1))
        terms = jnp.exp(logits - largest[:, None])
        return LogSumExp(largest, self.total * jnp.exp(self.largest - largest) + jnp.sum(terms, axis=-1))

    def shifted(self, logits: Array) -> Array:
        """Logits relative to the largest: exact where it matters, however large they are."""
        return logits - self.largest[:, None]

    def log_probabilities(self, logits: Array) -> Array:
        return self.shifted(logits) - jnp.log(self.total)[:, None]

    def log(self) -> Array:
        return self.largest + jnp.log(self.total)
