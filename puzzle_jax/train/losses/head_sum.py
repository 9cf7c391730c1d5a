"""The weighted sum of losses on next-token distributions, with four matmuls by the heads: both models' logits, and the
gradients with respect to the student's states and head.

Where only the sum is wanted, a token's gradient is known as soon as its logits are, up to its weight and the one number
that the backward pass receives. So the forward pass computes the gradients and keeps them, instead of recomputing
logits later (as Liger kernels do, arXiv 2410.10989). Groups of tokens see the whole vocabulary and are limited to
`MOST_LOGITS` logits of each model, so memory does not grow with the vocabulary either, but for the head's own gradient.

Left out: meshes, on which the head's gradient would be summed over devices once per group; `losses.head` has fewer.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels import checks
from puzzle_jax.model.network import rms_norm
from puzzle_jax.train.losses.definitions import TopK
from puzzle_jax.train.losses.head import HeadSettings, Reference, checked, given_of, losses, models_of
from puzzle_jax.train.losses.head_chunks import Carry, Chunk, Head, gather, split
from puzzle_jax.train.losses.head_kinds import KINDS

MOST_LOGITS = 1 << 26
"""Most logits of one model that exist at a time: a quarter of a GiB in float32."""


def head_loss_sum(
    kind: str,
    student: Head,
    x: Float[Array, "tokens hidden"],
    weights: Float[Array, "weighed"],
    *,
    eps: float,
    teacher: Head | None = None,
    y: Float[Array, "teacher_tokens teacher_hidden"] | None = None,
    targets: Int[Array, "targeted"] | None = None,
    top_k: TopK | None = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    token_chunk: int = 2048,
    vocab_chunk: int = 4096,
) -> Float[Array, ""]:
    """sum_t weights_t loss_t, differentiable in `x` and in both arrays of `student`, and in nothing else.

    Args:
      weights: one per token; tokens of weight 0 have no influence, whatever they hold.
      others: as in `head_losses`, whose losses are summed, and which computes them where nothing is differentiated.

    Raises ValueError as `head_losses` does.
    """
    settings = HeadSettings(kind, eps, temperature, beta, token_chunk, vocab_chunk)
    reference = checked(settings, student, x, Reference(teacher, y, targets, top_k))
    checks.shapes(f"x of shape {x.shape}", {"weights": (weights, x.shape[:1])})
    if x.shape[0] == 0:
        return jnp.float32(0)
    with jax.named_scope(f"head_{kind}"):
        x = jnp.where(weights[:, None] != 0, x, 0)
        return _sum(settings, student, x, *jax.lax.stop_gradient((weights, reference)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(settings: HeadSettings, student: Head, x: Array, weights: Array, reference: Reference) -> Array:
    return jnp.sum(_weighed(weights, losses(settings, student, x, reference)))


def _weighed(weights: Array, per_token: Array) -> Array:
    return jnp.where(weights != 0, weights * per_token, 0.0)


def _forward(
    settings: HeadSettings, student: Head, x: Array, weights: Array, reference: Reference
) -> tuple[Array, tuple[Head, Array, Array]]:
    """The sum, and its gradients with respect to `student` and `x`; zeros for `weights`."""
    kind, vocab, teacher = KINDS[settings.kind], student.weight.shape[1], reference.teacher
    groups = -(-x.shape[0] // min(settings.token_chunk, max(MOST_LOGITS // vocab, 1)))

    def group(sums: tuple[Array, Head], inputs: tuple[Array, Array, Reference]) -> tuple[tuple[Array, Head], Array]:
        total, d_head = sums
        x, weights, reference = inputs
        given, models = given_of(settings, student, reference), models_of(settings, student, x, reference, teacher)
        logits = [
            jnp.matmul(y, weight.astype(y.dtype), preferred_element_type=jnp.float32) / settings.temperature
            for y, weight in models
        ]
        chunk = Chunk(jnp.int32(0), jnp.int32(0), tuple(logits))

        def whole(step: object, start: Carry) -> Carry:
            return step(start, chunk)  # type: ignore[operator]

        found, saved = kind.loss(whole, x.shape[0], given)
        y = models[0][0]
        scale = settings.temperature * weights[:, None]  # T^2 from the loss, 1 / T from its logits
        d_logits = jnp.where(scale != 0, scale * kind.gradient(chunk, saved, given), 0.0).astype(y.dtype)
        d_y = jnp.matmul(d_logits, student.weight.astype(y.dtype).T, preferred_element_type=jnp.float32)
        d_weight = d_head.weight + jnp.matmul(y.T, d_logits, preferred_element_type=jnp.float32)
        _, through_norm = jax.vjp(
            lambda x, norm: rms_norm(x, norm, settings.eps), x.astype(jnp.float32), student.norm.astype(jnp.float32)
        )
        d_x, d_norm = through_norm(d_y)
        total = total + settings.temperature**2 * jnp.sum(_weighed(weights, found))
        return (total, Head(d_head.norm + d_norm, d_weight)), d_x.astype(x.dtype)

    per_token = jax.tree.map(partial(split, groups=groups), (x, weights, reference._replace(teacher=None)))
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), student)
    (total, d_head), d_x = jax.lax.scan(group, (jnp.float32(0), zeros), per_token)
    d_student = jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), d_head, student)
    return total, (d_student, gather(d_x, x.shape[0]), jnp.zeros_like(weights))


def _backward(settings: HeadSettings, gradients: tuple[Head, Array, Array], d_total: Array) -> tuple:
    student, x, weights = jax.tree.map(lambda gradient: (d_total * gradient).astype(gradient.dtype), gradients)
    return student, x, weights, None


_sum.defvjp(_forward, _backward)
