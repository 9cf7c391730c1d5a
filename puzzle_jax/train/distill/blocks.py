"""Blockwise local distillation: every layer of the student learns alone, on the parent's activations.

    loss_l = sum_t w_t |f_l(x_t) - g_l(x_t)|^2 / sum_t w_t |g_l(x_t)|^2

x is the parent's hidden state before layer l, g_l what the parent's layer adds to it and f_l what the student's does
(Puzzle, arXiv 2411.19146, section 3.2: MSE of the block over that of a block that outputs 0). No layer depends on
another, so all layers of a child train in one program, and what a layer has learnt is valid wherever it is used: as a
warm start for distillation, or in alternatives that the search is to score with weights of their own.

Embedding, final norm and head have no block and stay as they are. All tokens count, including those of prompts, but not
padding. Both sums run over a micro-batch, and micro-batches are weighted by their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from puzzle_jax.model.network import embed
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import stacked_layers
from puzzle_jax.train.distill.objectives import Fixed, Loss
from puzzle_jax.train.losses.definitions import TINY
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.student import Student


@dataclass(frozen=True, eq=False)
class Blocks:
    """The objective: the mean of the layers' normalised errors.

    Raises ValueError for a student whose embedding, final norm and head would learn.
    """

    student: Student

    def __post_init__(self) -> None:
        if self.student.ends:
            raise ValueError("embedding, final norm and head have no block to learn in, but the student's ends are to")

    def __call__(self, trained: Params, fixed: Fixed, batch: Packed, key: Array | None = None) -> Loss:
        """The loss of one micro-batch [rows, length]; terms are the layers' mean and worst error. `key` is not used."""
        student = self.student
        teacher = student.teacher_hidden(fixed.base, batch, keep_states=True)
        assert teacher.states is not None
        start = embed(fixed.base, jnp.asarray(batch.tokens)).astype(teacher.states.dtype)
        before = jnp.concatenate([start[None], teacher.states[:-1]])
        after = stacked_layers(
            student.params(fixed.base, trained),
            student.config,
            student.runs,
            jax.lax.stop_gradient(before),
            windows=student.windows,
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
            expert_masks=student.masks,
            remat=student.remat,
        )
        live = (jnp.asarray(batch.segment_ids) > 0).astype(jnp.float32)
        with jax.named_scope("block_errors"):
            # Both blocks add to the same x, so their outputs differ by as much as what they add.
            error = _squares(after, teacher.states, live) / jnp.maximum(_squares(teacher.states, before, live), TINY)
            mean = jnp.mean(error)
        weight = jnp.sum(live)
        terms = {"block_mse": mean * weight, "worst_block_mse": jnp.max(error) * weight}
        return Loss(mean * weight, weight, terms)


def _squares(
    x: Float[Array, "layers rows length hidden"], y: Float[Array, "layers rows length hidden"], live: Array
) -> Float[Array, "layers"]:
    """|x - y|^2 over live tokens [rows, length], in float32."""
    difference = x.astype(jnp.float32) - y.astype(jnp.float32)
    return jnp.sum(live * jnp.sum(difference * difference, axis=-1), axis=(1, 2))
