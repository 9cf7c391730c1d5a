"""How far a child's next-token distribution is from its parent's.

KL(parent || child) per position, from final hidden states: the output head is applied in chunks of the vocabulary
with running maxima, so that no [tokens, vocabulary] array exists.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.network import rms_norm
from puzzle_jax.model.spec import Params


class Divergence(NamedTuple):
    """Per position: KL in nats, whether both rank the same token first, cosine of the final hidden states."""

    kl: Float[Array, "*batch"]
    agreement: Float[Array, "*batch"]
    cosine: Float[Array, "*batch"]


class _Running(NamedTuple):
    largest: Array  # of the parent's and of the child's logits so far, [2, *batch]
    total: Array  # sum of exp(logit - largest), [2, *batch]
    cross: Array  # sum of exp(parent - largest parent) * (parent - child)
    best: Array  # token with the largest logit, [2, *batch]


def divergence(
    params: Params,
    config: ModelConfig,
    parent: Float[Array, "*batch hidden"],
    child: Float[Array, "*batch hidden"],
    chunk: int = 8192,
) -> Divergence:
    """Compares final hidden states (before the final norm) of parent and child.

    Args:
      params: only the final norm and the head are used, the same for both.
      chunk: vocabulary entries at a time.
    """
    normed = [rms_norm(x, params["final_norm"], config.rms_norm_eps) for x in (parent, child)]
    head = params["head"]
    vocab = head.shape[1]
    chunk = min(chunk, vocab)
    chunks = -(-vocab // chunk)
    head = jnp.pad(head, [(0, 0), (0, chunks * chunk - vocab)])

    def step(running: _Running, index: Array) -> tuple[_Running, None]:
        part = jax.lax.dynamic_slice_in_dim(head, index * chunk, chunk, axis=1)
        real = index * chunk + jnp.arange(chunk) < vocab
        logits = jnp.stack([jnp.matmul(y, part.astype(y.dtype), preferred_element_type=jnp.float32) for y in normed])
        seen = jnp.where(real, logits, -jnp.inf)
        here = jnp.max(seen, axis=-1)
        largest = jnp.maximum(running.largest, here)
        scale = jnp.exp(running.largest - largest)
        weights = jnp.exp(seen - largest[..., None])
        cross = running.cross * scale[0] + jnp.sum(weights[0] * (logits[0] - logits[1]), axis=-1)
        best = jnp.where(here > running.largest, index * chunk + jnp.argmax(seen, axis=-1), running.best)
        return _Running(largest, running.total * scale + jnp.sum(weights, axis=-1), cross, best), None

    shape = parent.shape[:-1]
    start = _Running(
        jnp.full((2, *shape), -jnp.inf),
        jnp.zeros((2, *shape)),
        jnp.zeros(shape),
        jnp.zeros((2, *shape), jnp.int32),
    )
    end, _ = jax.lax.scan(step, start, jnp.arange(chunks))
    log_total = end.largest + jnp.log(end.total)
    kl = end.cross / end.total[0] - log_total[0] + log_total[1]
    return Divergence(jnp.maximum(kl, 0.0), (end.best[0] == end.best[1]).astype(jnp.float32), _cosine(parent, child))


def _cosine(a: Float[Array, "*batch hidden"], b: Float[Array, "*batch hidden"]) -> Float[Array, "*batch"]:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-20)
