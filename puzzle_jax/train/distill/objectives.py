"""The objective of distillation: how far the student is from its parent, on the assistant's tokens.

    loss = sum_t weights_t * sum_i share_i * loss_i(t) / sum_t weights_t

The terms are on next-token distributions (`head_losses`) and on hidden states after every layer, averaged over layers
(`losses.definitions`). Puzzle uses KL and cosine; its authors found the LM loss to hurt (arXiv 2411.19146, section 5).

Left out: terms on attention or router probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range
from puzzle_jax.model.child import View
from puzzle_jax.model.network import traced_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.temperature import GREATEST_TEMPERATURE, LEAST_LOSS_TEMPERATURE
from puzzle_jax.train.losses import definitions as losses
from puzzle_jax.train.losses.definitions import TopK
from puzzle_jax.train.losses.head import head_losses
from puzzle_jax.train.losses.head_sum import head_loss_sum
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.student import Student, head_of

DISTRIBUTION = ("forward_kl", "reverse_kl", "jsd", "top_k_kl", "next_token")
HIDDEN = ("hidden_cosine", "hidden_mse")
FROM_TEACHER = ("forward_kl", "reverse_kl", "jsd")
"""Terms that need the teacher's final states."""


@dataclass(frozen=True)
class LossSettings:
    """Shares of the terms; a term with share 0 is not computed.

    Attributes:
      forward_kl, reverse_kl, jsd: divergence between the teacher's and the student's distributions.
      top_k_kl: KL on the teacher's most likely tokens, read from a cache (`teacher_cache`) without running the teacher.
      next_token: the LM loss on the answer's own tokens.
      hidden_cosine, hidden_mse: distance between hidden states after every layer.
      temperature: divides logits in all terms but `next_token`.
      token_chunk, vocab_chunk: tokens and vocabulary entries whose logits are held at a time.
    """

    forward_kl: float = 1.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    top_k_kl: float = 0.0
    next_token: float = 0.0
    hidden_cosine: float = 0.0
    hidden_mse: float = 0.0
    temperature: float = 1.0
    token_chunk: int = 2048
    vocab_chunk: int = 4096

    def __post_init__(self) -> None:
        for name in (*DISTRIBUTION, *HIDDEN):
            check_range(f"loss.{name}", getattr(self, name), 0)
        if not self.shares:
            raise ConfigError("all terms of loss are 0, but at least one must be above")
        check_range("loss.temperature", self.temperature, LEAST_LOSS_TEMPERATURE, GREATEST_TEMPERATURE)
        for name in ("token_chunk", "vocab_chunk"):
            check_range(f"loss.{name}", getattr(self, name), 1, MOST_TOKENS)

    @property
    def shares(self) -> dict[str, float]:
        """The terms with a share above 0."""
        return {name: share for name in (*DISTRIBUTION, *HIDDEN) if (share := getattr(self, name))}


class Fixed(NamedTuple):
    """Inputs that a step reads and does not change.

    Attributes:
      base: the base parameters.
      view: masks and windows in place of the student's own (`Student.hidden`).
    """

    base: Params
    view: View | None = None


class Loss(NamedTuple):
    """Sums over a micro-batch, so that micro-batches add up.

    Attributes:
      total: sum of weights times losses, of which gradients are taken.
      weight: sum of weights.
      terms: sums of weights times each term, by name.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]


@dataclass(frozen=True, eq=False)
class Distillation:
    """The objective of a student that follows its parent."""

    student: Student
    settings: LossSettings

    def __call__(self, trained: Params, fixed: Fixed, batch: Packed, key: Array | None = None) -> Loss:
        """The loss of one micro-batch [rows, length]; `key` is not used."""
        settings, student = self.settings, self.student
        shares = settings.shares
        states = any(name in HIDDEN for name in shares)
        teacher = None
        if states or any(name in FROM_TEACHER for name in shares):
            teacher = student.teacher_hidden(fixed.base, batch, keep_states=states)
        own = student.hidden(fixed.base, trained, batch, keep_states=states, view=fixed.view)
        weights = jnp.asarray(batch.weights).reshape(-1)
        of_head = partial(
            head_loss_sum if traced_mesh() is None else _separate_sum,
            student=head_of(student.params(fixed.base, trained)),
            x=_flat(own.x),
            weights=weights,
            eps=student.config.rms_norm_eps,
            teacher=head_of(fixed.base),
            y=None if teacher is None else _flat(teacher.x),
            targets=jnp.asarray(batch.targets).reshape(-1),
            top_k=_top_k(batch.extras) if "top_k_kl" in shares else None,
            token_chunk=settings.token_chunk,
            vocab_chunk=settings.vocab_chunk,
        )
        terms: dict[str, Array] = {}
        for name in shares:
            if name in DISTRIBUTION:
                terms[name] = of_head(name, temperature=1.0 if name == "next_token" else settings.temperature)
            else:
                assert teacher is not None
                with jax.named_scope(name):
                    per_token = getattr(losses, name)(own.states, teacher.states).mean(0).reshape(-1)
                terms[name] = _weighed(weights, per_token)
        total = sum((share * terms[name] for name, share in shares.items()), jnp.float32(0))
        return Loss(total, jnp.sum(weights), terms)


def _separate_sum(kind: str, *, weights: Array, **options: Any) -> Array:
    """`head_loss_sum`, computed from the loss of every token."""
    return _weighed(weights, head_losses(kind, **options))


def _weighed(weights: Array, per_token: Array) -> Array:
    return jnp.sum(jnp.where(weights > 0, per_token * weights, 0.0))


def _flat(x: Array) -> Array:
    """[rows, length, size] as [tokens, size]."""
    return x.reshape(-1, x.shape[-1])


def _top_k(extras: Mapping[str, ArrayLike]) -> TopK:
    """The teacher's top k, which `teacher_cache.TeacherCache.extras` added to the batch."""
    ids, logits, log_total = (jnp.asarray(extras[f"teacher_{name}"]) for name in ("ids", "logits", "log_total"))
    return TopK(_flat(ids), _flat(logits).astype(jnp.float32), log_total.reshape(-1))
