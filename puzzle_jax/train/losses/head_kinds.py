"""The losses of `definitions` as folds over slices of the vocabulary, with gradients from a few numbers per token.

With s and t the student's and teacher's logits divided by T, q = softmax(s), p = softmax(t), and Z their log-sum-exps:

| kind | loss / T^2 | its gradient in s_v | kept per token |
|---|---|---|---|
| forward_kl | E_p[log p - log q] | q_v - p_v | Z_s, Z_t |
| reverse_kl | R = E_q[log q - log p] | q_v (log q_v - log p_v - R) | Z_s, Z_t, R |
| jsd | beta KL(p, m) + (1 - beta) D | (1 - beta) q_v (log q_v - log m_v - D) | Z_s, Z_t, D |
| next_token | Z_s - s_target | q_v - [v = target] | Z_s |
| entropy | H = Z_s - E_q[s] | -q_v (log q_v + H) | Z_s, H |
| top_k_kl | see `definitions.top_k_kl` | q_v - p_v in S, q_v - p_rest q_v / q_rest elsewhere | Z_s, Z_rest |

S is the set of the teacher's top k tokens, m = beta p + (1 - beta) q, and D = KL(q, m). For jsd, the derivative with
respect to q_v is -beta (1 - beta) p_v / m_v + (1 - beta) (log(q_v / m_v) + 1 - (1 - beta) q_v / m_v), which equals
(1 - beta) log(q_v / m_v), because the other terms add up to (1 - beta) (1 - m_v / m_v) = 0; the softmax then subtracts
D, the mean of log(q_v / m_v) under q. m needs both Z, so only this kind sweeps the vocabulary twice.

Z is kept as two numbers, the largest logit and the sum of exp(logit - largest), because log p is exact only when it is
computed relative to the largest logit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from puzzle_jax.train.losses.definitions import TopK, rest_term
from puzzle_jax.train.losses.head_chunks import MASKED, Carry, Chunk, LogSumExp

Saved = tuple[Any, ...]  # arrays and LogSumExp over [tokens]; which ones depends on the kind


@runtime_checkable
class Sweep(Protocol):
    """`head_chunks.sweep` bound to its models; returns the carry after the last slice."""

    def __call__(self, step: Callable[[Carry, Chunk], Carry], start: Carry, /) -> Carry: ...


class Given(NamedTuple):
    """The targets of a group of tokens besides the teacher's logits; vocabulary size and settings."""

    targets: Array | None  # [tokens]
    top_k: TopK | None
    vocab: int
    temperature: float
    beta: float


class Kind(NamedTuple):
    """One loss.

    Attributes:
      loss: (sweep, tokens, given) -> loss / T^2 [tokens], and the values per token that `gradient` needs.
      gradient: (chunk, saved, given) -> gradient of it in the student's logits / T, [tokens, columns]; 0 where masked.
      needs: names of the arguments of `head_losses` that it reads.
    """

    loss: Callable[[Sweep, int, Given], tuple[Array, Saved]]
    gradient: Callable[[Chunk, Saved, Given], Array]
    needs: tuple[str, ...]


def _forward_kl(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    """Sums exp(t - max t) ((t - max t) - (s - max s)) with the maxima of the slices so far."""

    def step(seen: tuple[LogSumExp, LogSumExp, Array], chunk: Chunk) -> tuple[LogSumExp, LogSumExp, Array]:
        (old_s, old_t, cross), (s, t) = seen, chunk.logits
        of_s, of_t = old_s.add(s), old_t.add(t)
        moved = (old_t.largest - old_s.largest) - (of_t.largest - of_s.largest)
        cross = jnp.exp(old_t.largest - of_t.largest) * (cross + old_t.total * moved)
        terms = jnp.exp(of_t.shifted(t)) * (of_t.shifted(t) - of_s.shifted(s))
        return of_s, of_t, cross + jnp.sum(terms, axis=-1)

    start = (LogSumExp.empty(tokens), LogSumExp.empty(tokens), jnp.zeros(tokens, jnp.float32))
    of_s, of_t, cross = sweep(step, start)
    return cross / of_t.total - jnp.log(of_t.total) + jnp.log(of_s.total), (of_s, of_t)


def _forward_kl_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    (s, t), (of_s, of_t) = chunk.logits, saved
    return jnp.exp(of_s.log_probabilities(s)) - jnp.exp(of_t.log_probabilities(t))


def _reverse_kl(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    def swapped(step: Callable[[Carry, Chunk], Carry], start: Carry, /) -> Carry:
        return sweep(lambda seen, chunk: step(seen, chunk._replace(logits=chunk.logits[::-1])), start)

    loss, (of_t, of_s) = _forward_kl(swapped, tokens, given)
    return loss, (of_s, of_t, loss)


def _reverse_kl_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    (s, t), (of_s, of_t, mean) = chunk.logits, saved
    log_q = of_s.log_probabilities(s)
    return jnp.exp(log_q) * (log_q - of_t.log_probabilities(t) - mean[:, None])


def _jsd(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    def total(seen: tuple[LogSumExp, LogSumExp], chunk: Chunk) -> tuple[LogSumExp, LogSumExp]:
        return seen[0].add(chunk.logits[0]), seen[1].add(chunk.logits[1])

    of_s, of_t = sweep(total, (LogSumExp.empty(tokens), LogSumExp.empty(tokens)))

    def step(seen: tuple[Array, Array], chunk: Chunk) -> tuple[Array, Array]:
        log_q, log_p, log_m = _mixture(chunk, of_s, of_t, given.beta)
        of_student, of_teacher = seen
        of_student = of_student + jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
        return of_student, of_teacher + jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)

    start = (jnp.zeros(tokens, jnp.float32), jnp.zeros(tokens, jnp.float32))
    of_student, of_teacher = sweep(step, start)
    return given.beta * of_teacher + (1 - given.beta) * of_student, (of_s, of_t, of_student)


def _jsd_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    of_s, of_t, mean = saved
    log_q, _, log_m = _mixture(chunk, of_s, of_t, given.beta)
    return (1 - given.beta) * jnp.exp(log_q) * (log_q - log_m - mean[:, None])


def _mixture(chunk: Chunk, of_s: LogSumExp, of_t: LogSumExp, beta: float) -> tuple[Array, Array, Array]:
    """log q, log p and log m."""
    s, t = chunk.logits
    log_q, log_p = of_s.log_probabilities(s), of_t.log_probabilities(t)
    mixture = beta * jnp.exp(log_p) + (1 - beta) * jnp.exp(log_q)
    # Where both probabilities underflow float32, their products with any finite logarithm are 0.
    return log_q, log_p, jnp.log(jnp.maximum(mixture, jnp.finfo(jnp.float32).tiny))


def _next_token(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    assert given.targets is not None
    targets = given.targets[:, None]

    def step(seen: tuple[LogSumExp, Array], chunk: Chunk) -> tuple[LogSumExp, Array]:
        of_s, chosen = seen
        return of_s.add(chunk.logits[0]), chunk.pick(targets, chosen)

    of_s, chosen = sweep(step, (LogSumExp.empty(tokens), jnp.full(targets.shape, MASKED, jnp.float32)))
    return -of_s.log_probabilities(chosen)[:, 0], (of_s,)


def _next_token_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    assert given.targets is not None
    hit = chunk.columns() == given.targets[:, None]
    return jnp.exp(saved[0].log_probabilities(chunk.logits[0])) - hit.astype(jnp.float32)


def _entropy(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    """Sums exp(s - max s) (s - max s) with the maximum of the slices so far."""

    def step(seen: tuple[LogSumExp, Array], chunk: Chunk) -> tuple[LogSumExp, Array]:
        (old, moment), s = seen, chunk.logits[0]
        new = old.add(s)
        moved = old.largest - new.largest
        moment = jnp.exp(moved) * (moment + old.total * moved)
        return new, moment + jnp.sum(jnp.exp(new.shifted(s)) * new.shifted(s), axis=-1)

    of_s, moment = sweep(step, (LogSumExp.empty(tokens), jnp.zeros(tokens, jnp.float32)))
    entropy = jnp.log(of_s.total) - moment / of_s.total
    return entropy, (of_s, entropy)


def _entropy_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    of_s, entropy = saved
    log_q = of_s.log_probabilities(chunk.logits[0])
    return -jnp.exp(log_q) * (log_q + entropy[:, None])


def _top_k_kl(sweep: Sweep, tokens: int, given: Given) -> tuple[Array, Saved]:
    """The log-sum-exp of the rest is summed over the rest itself; as 1 minus the top k it would be lost to rounding."""
    assert given.top_k is not None
    ids = given.top_k.ids

    def step(seen: tuple[LogSumExp, Array], chunk: Chunk) -> tuple[LogSumExp, Array]:
        rest, chosen = seen
        s = chunk.logits[0]
        member = _scatter(chunk, ids, jnp.zeros(s.shape, bool), True)
        return rest.add(jnp.where(member, MASKED, s)), chunk.pick(ids, chosen)

    rest, chosen = sweep(step, (LogSumExp.empty(tokens), jnp.full(ids.shape, MASKED, jnp.float32)))
    of_s = rest.add(chosen)
    log_p = given.top_k.log_probabilities(given.temperature)
    inside = jnp.sum(jnp.exp(log_p) * (log_p - of_s.log_probabilities(chosen)), axis=-1)
    p_rest = given.top_k.rest(given.temperature, given.vocab)
    return inside + rest_term(p_rest, rest.log() - of_s.log()), (of_s, rest)


def _top_k_kl_gradient(chunk: Chunk, saved: Saved, given: Given) -> Array:
    assert given.top_k is not None
    s, (of_s, rest) = chunk.logits[0], saved
    p = jnp.exp(given.top_k.log_probabilities(given.temperature))
    p_rest = given.top_k.rest(given.temperature, given.vocab)
    none = -1.0  # marks tokens outside the top k; no probability is negative
    p = _scatter(chunk, given.top_k.ids, jnp.full(s.shape, none, jnp.float32), p)
    spread = p_rest[:, None] * jnp.exp(rest.log_probabilities(s))
    return jnp.exp(of_s.log_probabilities(s)) - jnp.where(p == none, spread, p)


def _scatter(chunk: Chunk, ids: Array, into: Array, values: Array | bool) -> Array:
    """Sets the entries of `into` [tokens, columns] at those `ids` [tokens, k] that lie in the slice."""
    return into.at[jnp.arange(ids.shape[0])[:, None], chunk.place(ids)].set(values, mode="drop")


KINDS = {
    "forward_kl": Kind(_forward_kl, _forward_kl_gradient, ("teacher", "y")),
    "reverse_kl": Kind(_reverse_kl, _reverse_kl_gradient, ("teacher", "y")),
    "jsd": Kind(_jsd, _jsd_gradient, ("teacher", "y")),
    "next_token": Kind(_next_token, _next_token_gradient, ("targets",)),
    "entropy": Kind(_entropy, _entropy_gradient, ()),
    "top_k_kl": Kind(_top_k_kl, _top_k_kl_gradient, ("top_k",)),
}
