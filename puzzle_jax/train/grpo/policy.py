"""The objective of reinforcement learning on packed answers: the policy's loss from its own log-probabilities.

    loss = sum_t coefficient_t * loss_t        t: tokens of answers that count

`losses.policy` defines loss_t; coefficients weigh tokens and answers relative to the whole batch, so that the losses of
micro-batches add up. Rows carry in `Packed.extras`, at the position before a target, the values that belong to it:

    coefficients, advantages   those of its answer
    shares                     1 / tokens of the whole batch
    sampler                    log-probability with which it was drawn
    old, reference             log-probability before the first of several updates, and under the initial policy
    experts                    [layers, k] that the sampler chose at this position

Without `old`, the policy that sampled is the one that learns: its ratio, the probability over itself, is exactly 1.
Where experts are replayed, gates are the softmax of the trainer's own logits of those experts (routing replay, R3:
arXiv 2510.11370; GSPO, arXiv 2507.18071, section 5.3, reports collapse without it).

Left out: answers sampled at temperatures other than 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.kernels.prefix_attention import Layout
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import Hidden
from puzzle_jax.train.distill.objectives import Fixed, Loss
from puzzle_jax.train.grpo.shared_rows import layout_of
from puzzle_jax.train.losses.head import Head, head_losses
from puzzle_jax.train.losses.policy import policy_loss
from puzzle_jax.train.losses.policy_settings import ResolvedPolicy
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.student import Student, head_of

MAXIMUM = "_max"
"""Suffix of the names of metrics that are maxima, not means."""


class Scores(NamedTuple):
    """Log-probabilities of a batch's targets before it is learnt from, 0 where no target counts: under the current
    policy, and under the one that training began with."""

    old: Float[Array, "rows length"] | None
    reference: Float[Array, "rows length"] | None


@dataclass(frozen=True, eq=False)
class Policy:
    """The objective of a model that learns from its own answers.

    Attributes:
      student: the model as a view on itself: its parent is the policy that training began with, and the reference.
      strip: positions of a strip, where rows hold one prompt each with its answers (`shared_rows`); 0 where every
        answer has its own copy of the prompt.
    """

    student: Student
    settings: ResolvedPolicy
    token_chunk: int = 2048
    vocab_chunk: int = 4096
    strip: int = 0

    def __call__(self, trained: Params, fixed: Fixed, batch: Packed, key: Array | None = None) -> Loss:
        """The loss of one micro-batch [rows, length]; `key` is not used.

        `Loss.weight` is this micro-batch's share of the batch's tokens, so that weights add up to 1, and `Loss.terms`
        are shares times means, except for names that end in `MAXIMUM`.
        """
        replay = _replay(batch)
        hidden = self.student.hidden(fixed.base, trained, batch, replay=replay, layout=self._layout(batch))
        head = head_of(self.student.params(fixed.base, trained))
        mask = (jnp.asarray(batch.weights) > 0).reshape(-1)
        log_probs = jnp.where(mask, self._log_probs(head, hidden, batch), 0.0)
        given = {name: jnp.asarray(values).reshape(-1) for name, values in batch.extras.items() if name != "experts"}
        old = given.get("old")
        of_entropy = (head, hidden.x) if self.settings.entropy else jax.lax.stop_gradient((head, hidden.x))
        found = policy_loss(
            self.settings,
            log_probs,
            jax.lax.stop_gradient(log_probs) if old is None else old,
            given["advantages"],
            answer_numbers(batch),
            batch.tokens.size,
            mask,
            sampler=given["sampler"],
            reference=given.get("reference"),
            entropy=self._entropy(*of_entropy),
        )
        share = given["shares"]
        metrics = dict(found.metrics)
        largest = {name: jnp.max(jnp.where(mask, metrics[name], 0.0)) for name in ("ratio", "sampler_gap")}
        metrics["ratio_mean"] = metrics.pop("ratio")
        terms = {name: jnp.sum(jnp.where(mask, share * values, 0.0)) for name, values in metrics.items()}
        terms |= {name + MAXIMUM: value for name, value in largest.items()}
        if replay is not None and hidden.routed is not None:
            differ = experts_differ(replay, hidden.routed).mean(0)
            terms["experts_differ"] = jnp.sum(jnp.where(mask, share * differ, 0.0))
        total = jnp.sum(jnp.where(mask, given["coefficients"] * found.per_token, 0.0))
        return Loss(total, jnp.sum(jnp.where(mask, share, 0.0)), terms)

    def score(self, trained: Params, fixed: Fixed, batch: Packed, *, old: bool, reference: bool) -> Scores:
        """Log-probabilities of a batch's targets, under the policies that are asked for."""
        replay, shape, layout = _replay(batch), batch.weights.shape, self._layout(batch)
        counts = jnp.asarray(batch.weights) > 0

        def of(head: Head, hidden: Hidden) -> Array:
            return jnp.where(counts, self._log_probs(head, hidden, batch).reshape(shape), 0.0)

        of_old = of_reference = None
        if old:
            head = head_of(self.student.params(fixed.base, trained))
            of_old = of(head, self.student.hidden(fixed.base, trained, batch, replay=replay, layout=layout))
        if reference:
            first = self.student.teacher_hidden(fixed.base, batch, replay=replay, layout=layout)
            of_reference = of(head_of(fixed.base), first)
        return Scores(of_old, of_reference)

    def _layout(self, batch: Packed) -> Layout | None:
        return layout_of(batch.tokens.shape[-1], self.strip) if self.strip else None

    def _log_probs(self, head: Head, hidden: Hidden, batch: Packed) -> Float[Array, "tokens"]:
        return -self._of_head("next_token", head, hidden.x, targets=jnp.asarray(batch.targets).reshape(-1))

    def _entropy(self, head: Head, x: Float[Array, "rows length hidden"]) -> Float[Array, "tokens"]:
        return self._of_head("entropy", head, x)

    def _of_head(self, kind: str, head: Head, x: Array, targets: Array | None = None) -> Float[Array, "tokens"]:
        return head_losses(
            kind,
            head,
            x.reshape(-1, x.shape[-1]),
            targets=targets,
            eps=self.student.config.rms_norm_eps,
            token_chunk=self.token_chunk,
            vocab_chunk=self.vocab_chunk,
        )


def answer_numbers(batch: Packed) -> Int[Array, "tokens"]:
    """Number of the answer that each position belongs to: below rows * length, and unique to a segment of a row."""
    rows, length = batch.segment_ids.shape
    segments = jnp.maximum(jnp.asarray(batch.segment_ids) - 1, 0)
    return (segments + jnp.arange(rows)[:, None] * length).reshape(-1)


def experts_differ(one: Int[Array, "layers tokens k"], other: Int[Array, "layers tokens k"]) -> Bool[Array, "l t"]:
    """Returns, by layer and token, whether two choices of experts differ as sets."""
    return jnp.any(jnp.sort(one, axis=-1) != jnp.sort(other, axis=-1), axis=-1)


def replayed(experts: np.ndarray, tokens: int) -> np.ndarray:
    """The sampler's choices [tokens - 1, layers, k], extended to all tokens of an example: the last one was drawn but
    never run, and takes the experts of the one before."""
    return np.concatenate([experts, experts[-1:]])[:tokens]


def _replay(batch: Packed) -> Int[Array, "layers tokens k"] | None:
    """Experts to replay by layer; in padding, the first k, which are as good as any others."""
    experts = batch.extras.get("experts")
    if experts is None:
        return None
    rows, length, layers, k = experts.shape
    filler = jnp.arange(k, dtype=jnp.int32)
    padding = (jnp.asarray(batch.segment_ids) == 0)[..., None, None]
    chosen = jnp.where(padding, filler, jnp.asarray(experts).astype(jnp.int32))
    return jnp.moveaxis(chosen.reshape(rows * length, layers, k), 1, 0)
