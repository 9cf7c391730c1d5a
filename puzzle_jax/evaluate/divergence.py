"""The distance of a child's next-token distribution from its parent's.

KL(parent || child) per position, from final hidden states: the output head is applied in chunks of the vocabulary
with running maxima, so that no [tokens, vocabulary] array exists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.network import columns, rms_norm
from puzzle_jax.model.spec import Params, output_head


class Divergence(NamedTuple):
    """Per position: KL in nats, whether both rank the same token first, cosine of the final hidden states."""

    kl: Float[Array, "*children_and_batch"]
    agreement: Float[Array, "*children_and_batch"]
    cosine: Float[Array, "*children_and_batch"]


class _Seen(NamedTuple):
    """Running statistics of one model's logits over the chunks so far."""

    largest: Array
    total: Array  # sum of exp(logit - largest)
    best: Array  # token with the largest logit

    def with_chunk(self, logits: Array, first: Array) -> tuple[_Seen, Array]:
        """The statistics after another chunk, whose first token is `first`, and the factor that scales old totals."""
        here = jnp.max(logits, axis=-1)
        largest = jnp.maximum(self.largest, here)
        shrink = jnp.exp(self.largest - largest)
        total = self.total * shrink + jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        best = jnp.where(here > self.largest, first + jnp.argmax(logits, axis=-1), self.best)
        return _Seen(largest, total, best), shrink


def divergence(
    params: Params,
    config: ModelConfig,
    parent: Float[Array, "*batch hidden"],
    child: Float[Array, "*children_and_batch hidden"],
    chunk: int = 8192,
) -> Divergence:
    """Compares final hidden states (before the final norm) of a parent and of one or more children.

    Args:
      params: parameters, of which only the final norm and the head are used, for all models alike.
      parent: states of one model, whose logits are computed once.
      child: states at the same positions, with further axes in front for several children.
      chunk: vocabulary entries processed at a time.
    """
    parent_normed, child_normed = (rms_norm(x, params["final_norm"], config.rms_norm_eps) for x in (parent, child))
    head = output_head(params)
    vocab = head.shape[1]
    chunk = min(chunk, vocab)
    chunks = -(-vocab // chunk)

    def step(running: tuple[_Seen, _Seen, Array], index: Array) -> tuple[tuple[_Seen, _Seen, Array], None]:
        of_parent, of_child, cross = running
        first = jnp.minimum(index * chunk, vocab - chunk)
        part = columns(head, first, chunk, parent_normed.dtype)
        real = first + jnp.arange(chunk) >= index * chunk  # the last chunk overlaps the one before

        def logits(normed: Array) -> Array:
            return jnp.matmul(normed, part, preferred_element_type=jnp.float32)

        parent_logits, child_logits = logits(parent_normed), logits(child_normed)
        of_parent, shrink = of_parent.with_chunk(jnp.where(real, parent_logits, -jnp.inf), first)
        of_child, _ = of_child.with_chunk(jnp.where(real, child_logits, -jnp.inf), first)
        weights = jnp.where(real, jnp.exp(parent_logits - of_parent.largest[..., None]), 0.0)
        # sum of exp(parent - largest parent) * (parent - child)
        cross = cross * shrink + jnp.sum(weights * (parent_logits - child_logits), axis=-1)
        return (of_parent, of_child, cross), None

    def nothing(shape: tuple[int, ...]) -> _Seen:
        return _Seen(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))

    start = (nothing(parent.shape[:-1]), nothing(child.shape[:-1]), jnp.zeros(child.shape[:-1]))
    (of_parent, of_child, cross), _ = jax.lax.scan(step, start, jnp.arange(chunks))
    log_totals = [seen.largest + jnp.log(seen.total) for seen in (of_parent, of_child)]
    kl = cross / of_parent.total - log_totals[0] + log_totals[1]
    agreement = (of_parent.best == of_child.best).astype(jnp.float32)
    return Divergence(jnp.maximum(kl, 0.0), agreement, cosine(parent, child))


def cosine(a: Float[Array, "*batch hidden"], b: Float[Array, "*children_and_batch hidden"]) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-20)
