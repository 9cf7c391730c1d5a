"""The losses that training minimises, per token, as plain definitions on whole logits or hidden states, in float32.

They are the reference, for small vocabularies; `head_losses` computes the same from hidden states without ever holding
[tokens, vocab]. Every loss keeps the token axes, so that callers can form weighted sums.

A temperature T divides both models' logits and multiplies the loss by T^2, which preserves the size of gradients
(Hinton et al., arXiv 1503.02531). Gradients flow into both sides; stop them where a teacher is not a constant.

Sources: forward and reverse KL and the generalised Jensen-Shannon divergence as in arXiv 2306.13649; Puzzle distils
with KL and the cosine of hidden states together (arXiv 2411.19146).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

TINY = 1e-20  # smaller than any meaningful squared length


class TopK(NamedTuple):
    """A teacher's distribution, cut to its k likeliest tokens.

    Attributes:
      ids: the tokens, all different within a row.
      logits: their logits, not divided by the temperature.
      log_total: log of the sum over the whole vocabulary of exp(logit / T), T being the temperature of the loss that
        reads it. A total for T = 1 serves no other temperature.
    """

    ids: Int[Array, "*tokens k"]
    logits: Float[Array, "*tokens k"]
    log_total: Float[Array, "*tokens"]

    def log_probabilities(self, temperature: float) -> Float[Array, "*tokens k"]:
        return self.logits.astype(jnp.float32) / temperature - self.log_total.astype(jnp.float32)[..., None]

    def rest(self, temperature: float, vocab: int) -> Float[Array, "*tokens"]:
        """Probability of all other tokens together; exactly 0 where k is the whole vocabulary."""
        if self.ids.shape[-1] == vocab:
            return jnp.zeros(self.log_total.shape, jnp.float32)
        top = jax.nn.logsumexp(self.log_probabilities(temperature), axis=-1)
        return -jnp.expm1(jnp.minimum(top, 0.0))


def forward_kl(
    teacher_logits: Float[Array, "*tokens vocab"],
    student_logits: Float[Array, "*tokens vocab"],
    temperature: float = 1.0,
) -> Float[Array, "*tokens"]:
    """T^2 KL(p || q) = T^2 sum_v p_v (log p_v - log q_v), p the teacher's and q the student's distribution."""
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl(
    teacher_logits: Float[Array, "*tokens vocab"],
    student_logits: Float[Array, "*tokens vocab"],
    temperature: float = 1.0,
) -> Float[Array, "*tokens"]:
    """T^2 KL(q || p), which seeks the teacher's modes where `forward_kl` covers them."""
    return forward_kl(student_logits, teacher_logits, temperature)


def jsd(
    teacher_logits: Float[Array, "*tokens vocab"],
    student_logits: Float[Array, "*tokens vocab"],
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Float[Array, "*tokens"]:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q, 0 < beta < 1.

    Divided by beta it tends to the forward KL as beta falls to 0, and divided by 1 - beta to the reverse KL as beta
    rises to 1. It is at most T^2 log 2 for beta = 1/2.
    """
    log_p, log_q = _log_softmax(teacher_logits, temperature), _log_softmax(student_logits, temperature)
    log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
    of_teacher = jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)
    of_student = jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
    return temperature**2 * (beta * of_teacher + (1 - beta) * of_student)


def top_k_kl(
    top_k: TopK, student_logits: Float[Array, "*tokens vocab"], temperature: float = 1.0
) -> Float[Array, "*tokens"]:
    """Forward KL over k + 1 outcomes: each of the teacher's top-k tokens S, and all other tokens as one.

        T^2 (sum_{v in S} p_v (log p_v - log q_v) + p_rest (log p_rest - log q_rest)),
        p_rest = 1 - sum_{v in S} p_v,  q_rest = sum_{v not in S} q_v

    Both sides still sum to 1, so this is a divergence: merging outcomes can only lower the KL (data-processing
    inequality), hence it is a lower bound of `forward_kl`, and equals it where k is the vocabulary or where the student
    spreads the rest as the teacher does. Dropping the rest instead would give a loss that can fall below 0, and
    renormalising S alone would let the student move mass out of S for free.
    """
    vocab = student_logits.shape[-1]
    log_q = _log_softmax(student_logits, temperature)
    log_p = top_k.log_probabilities(temperature)
    inside = jnp.sum(jnp.exp(log_p) * (log_p - jnp.take_along_axis(log_q, top_k.ids, axis=-1)), axis=-1)
    if top_k.ids.shape[-1] == vocab:
        return temperature**2 * inside
    member = jnp.any(top_k.ids[..., None] == jnp.arange(vocab), axis=-2)
    log_q_rest = jax.nn.logsumexp(jnp.where(member, -jnp.inf, log_q), axis=-1)
    return temperature**2 * (inside + rest_term(top_k.rest(temperature, vocab), log_q_rest))


def rest_term(p_rest: Float[Array, "*tokens"], log_q_rest: Float[Array, "*tokens"]) -> Float[Array, "*tokens"]:
    """p_rest (log p_rest - log q_rest), 0 where the teacher leaves nothing to the rest."""
    some = p_rest > 0
    return jnp.where(some, p_rest * (jnp.log(jnp.where(some, p_rest, 1.0)) - log_q_rest), 0.0)


def next_token(
    student_logits: Float[Array, "*tokens vocab"], targets: Int[Array, "*tokens"], temperature: float = 1.0
) -> Float[Array, "*tokens"]:
    """-T^2 log q_target: the LM loss for T = 1, and at any T the forward KL from a teacher certain of the target."""
    log_q = _log_softmax(student_logits, temperature)
    return -(temperature**2) * jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]


def entropy(student_logits: Float[Array, "*tokens vocab"], temperature: float = 1.0) -> Float[Array, "*tokens"]:
    """-T^2 sum_v q_v log q_v: how undecided the student is, from 0 to T^2 log(vocabulary)."""
    log_q = _log_softmax(student_logits, temperature)
    return -(temperature**2) * jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def hidden_cosine(
    student: Float[Array, "*tokens hidden"], teacher: Float[Array, "*tokens hidden"]
) -> Float[Array, "*tokens"]:
    """1 - cos(student, teacher), from 0 to 2; 1, without gradient, where either is zero."""
    x, y = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return 1.0 - jnp.sum(_unit(x) * _unit(y), axis=-1)


def hidden_mse(
    student: Float[Array, "*tokens hidden"], teacher: Float[Array, "*tokens hidden"]
) -> Float[Array, "*tokens"]:
    """|student - teacher|^2 / |teacher|^2: 0 for equal states, 1 for a student whose states are 0.

    It is normalised per token, so that the few tokens whose states are hundreds of times longer than others' do not
    dominate, as they would in Puzzle's ratio of two means over all tokens.
    """
    x, y = student.astype(jnp.float32), teacher.astype(jnp.float32)
    return jnp.sum((x - y) ** 2, axis=-1) / jnp.maximum(jnp.sum(y * y, axis=-1), TINY)


def _unit(x: Array) -> Array:
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jnp.where(squared > TINY, jax.lax.rsqrt(jnp.maximum(squared, TINY)), 0.0)


def _log_softmax(logits: Array, temperature: float) -> Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
