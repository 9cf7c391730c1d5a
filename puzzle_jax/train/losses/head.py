"""Losses on next-token distributions, from final hidden states and without holding either model's logits in full.

    logits = rms_norm(x, norm) @ weight;  loss_t from logits_t and a teacher's logits, a target or a teacher's top k

With 131,072 tokens and a vocabulary of 201,088, the float32 logits of one model alone take 105 GB. Here tokens are
processed in groups and, for each group, the vocabulary in slices (`head_chunks`): the forward pass folds the slices
into a few numbers per token; the backward pass recomputes each slice's logits and turns them, with those numbers, into
gradients (`head_kinds`). Beyond inputs and gradients this takes a few [token_chunk, vocab_chunk] arrays; gradients of a
head and its norm are accumulated in float32.

Left out: gradients for teachers, and placement. Under jit, tokens may be sharded over devices, but then the head's
gradient is summed over devices slice by slice; inside `jax.shard_map`, with whole heads and each device's own tokens,
it is summed once, at the end.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.kernels import checks
from puzzle_jax.model.network import rms_norm
from puzzle_jax.train.losses.definitions import TopK
from puzzle_jax.train.losses.head_chunks import Chunk, Head, columns_of, gather, split, sweep
from puzzle_jax.train.losses.head_kinds import KINDS, Given, Saved


class HeadSettings(NamedTuple):
    """The static settings that a program is compiled for."""

    kind: str
    eps: float
    temperature: float
    beta: float
    token_chunk: int
    vocab_chunk: int


class Reference(NamedTuple):
    """The target that a student is compared with; `checked` sets the fields that the kind does not need to None."""

    teacher: Head | None
    y: Array | None
    targets: Array | None
    top_k: TopK | None


# Each length has a name of its own in these annotations, so that a mismatch reaches `_check`, whose message names both.
def head_losses(
    kind: str,
    student: Head,
    x: Float[Array, "tokens hidden"],
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
) -> Float[Array, "tokens"]:
    """The loss of each token, differentiable in `x` and in both arrays of `student`, and in nothing else.

    Args:
      kind: "forward_kl", "reverse_kl" or "jsd" (need `teacher` and `y`), "next_token" (needs `targets`), "top_k_kl"
        (needs `top_k`) or "entropy" (needs none of these). Arguments that a kind does not need are ignored.
      student: the model that learns. Logits are computed in the dtype of `x` and accumulated in float32.
      x: its final hidden states, before the norm.
      eps: epsilon of both models' norms.
      teacher: may be `student` itself or share its arrays; its hidden size may differ, its vocabulary may not.
      y: the teacher's final hidden states at the same positions.
      targets: the true next tokens.
      top_k: the teacher's likeliest tokens, with the log total for this temperature.
      temperature: T, which divides logits; losses of every kind are multiplied by T^2.
      beta: the teacher's share in the mixture of "jsd".
      token_chunk: tokens processed at a time.
      vocab_chunk: columns of a head processed at a time; need not divide the vocabulary.

    Raises:
      ValueError: the kind is unknown, something that it needs is missing, shapes do not fit each other, or a setting is
        out of range.
    """
    settings = HeadSettings(kind, eps, temperature, beta, token_chunk, vocab_chunk)
    reference = checked(settings, student, x, Reference(teacher, y, targets, top_k))
    if x.shape[0] == 0:
        return jnp.zeros(0, jnp.float32)
    with jax.named_scope(f"head_{kind}"):
        return losses(settings, student, x, jax.lax.stop_gradient(reference))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(settings: HeadSettings, student: Head, x: Array, reference: Reference) -> Array:
    return _forward(settings, student, x, reference)[0]


def _forward(settings: HeadSettings, student: Head, x: Array, reference: Reference) -> tuple[Array, tuple]:
    kind, groups = KINDS[settings.kind], _groups(settings, x)

    def group(_: None, inputs: tuple[Array, Reference]) -> tuple[None, tuple[Array, Saved]]:
        x, reference = inputs
        models = models_of(settings, student, x, reference, teacher)
        run = partial(sweep, models=models, temperature=settings.temperature, width=settings.vocab_chunk)
        return None, kind.loss(run, x.shape[0], given_of(settings, student, reference))

    teacher, per_token = reference.teacher, reference._replace(teacher=None)
    _, (losses, saved) = jax.lax.scan(group, None, jax.tree.map(partial(split, groups=groups), (x, per_token)))
    return settings.temperature**2 * gather(losses, x.shape[0]), (student, x, reference, saved)


def _backward(settings: HeadSettings, residuals: tuple, d_losses: Array) -> tuple[Head, Array, None]:
    student, x, reference, saved = residuals
    kind, groups = KINDS[settings.kind], _groups(settings, x)
    width = min(settings.vocab_chunk, student.weight.shape[1])

    def group(d_head: Head, inputs: tuple) -> tuple[Head, Array]:
        x, reference, saved, d_losses = inputs
        given = given_of(settings, student, reference)
        scale = settings.temperature * d_losses[:, None]  # T^2 from the loss, 1 / T from its logits
        models = models_of(settings, student, x, reference, teacher)
        y = models[0][0]

        def step(sums: tuple[Array, Array], chunk: Chunk) -> tuple[Array, Array]:
            d_y, d_weight = sums
            # Tokens of weight 0 get 0 even where garbage from the teacher makes the gradient NaN.
            d_logits = jnp.where(scale != 0, scale * kind.gradient(chunk, saved, given), 0.0).astype(y.dtype)
            columns = columns_of(student.weight, chunk.start, width, y.dtype)
            d_y += jnp.matmul(d_logits, columns.T, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_slice_in_dim(d_weight, chunk.start, width, axis=1)
            new = old + jnp.matmul(y.T, d_logits, preferred_element_type=jnp.float32)
            return d_y, jax.lax.dynamic_update_slice_in_dim(d_weight, new, chunk.start, axis=1)

        start = (jnp.zeros(y.shape, jnp.float32), d_head.weight)
        d_y, d_weight = sweep(step, start, models, temperature=settings.temperature, width=settings.vocab_chunk)
        # In float32, like the sum `d_y`, although the states at which that was taken were rounded to x.dtype.
        _, through_norm = jax.vjp(
            lambda x, norm: rms_norm(x, norm, settings.eps), x.astype(jnp.float32), student.norm.astype(jnp.float32)
        )
        d_x, d_norm = through_norm(d_y)
        return Head(d_head.norm + d_norm, d_weight), d_x.astype(x.dtype)

    teacher, per_token = reference.teacher, reference._replace(teacher=None)
    x_groups, reference_groups, d_groups = jax.tree.map(partial(split, groups=groups), (x, per_token, d_losses))
    zeros = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), student)
    d_head, d_x = jax.lax.scan(group, zeros, (x_groups, reference_groups, saved, d_groups))
    d_student = jax.tree.map(lambda gradient, array: gradient.astype(array.dtype), d_head, student)
    return d_student, gather(d_x, x.shape[0]), None


losses.defvjp(_forward, _backward)


def _groups(settings: HeadSettings, x: Array) -> int:
    return -(-x.shape[0] // settings.token_chunk)


def models_of(settings: HeadSettings, student: Head, x: Array, reference: Reference, teacher: Head | None) -> tuple:
    """Normalised states and head weight of each model whose logits the kind reads, the student first."""
    models = ((rms_norm(x, student.norm, settings.eps), student.weight),)
    if teacher is not None and reference.y is not None:
        models = (*models, (rms_norm(reference.y, teacher.norm, settings.eps), teacher.weight))
    return models


def given_of(settings: HeadSettings, student: Head, reference: Reference) -> Given:
    vocab = student.weight.shape[1]
    return Given(reference.targets, reference.top_k, vocab, settings.temperature, settings.beta)


def checked(settings: HeadSettings, student: Head, x: Array, reference: Reference) -> Reference:
    """The reference without what the kind does not read; raises ValueError as `head_losses` does."""
    reference = _needed(settings, reference)
    _check(settings, student, x, reference)
    return reference


def _needed(settings: HeadSettings, reference: Reference) -> Reference:
    """The reference without what the kind does not read."""
    if settings.kind not in KINDS:
        raise ValueError(f"kind is {settings.kind!r}, but must be one of {', '.join(KINDS)}")
    needs = KINDS[settings.kind].needs
    for name in needs:
        if getattr(reference, name) is None:
            raise ValueError(f"kind {settings.kind!r} needs {' and '.join(needs)}, but {name} is None")
    return Reference(*(value if name in needs else None for name, value in reference._asdict().items()))


def _check(settings: HeadSettings, student: Head, x: Array, reference: Reference) -> None:
    """Raises ValueError for settings out of range and shapes that do not fit."""
    for name in ("token_chunk", "vocab_chunk"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}, but must be at least 1")
    if not settings.temperature > 0:
        raise ValueError(f"temperature is {settings.temperature}, but must be above 0")
    if not 0 < settings.beta < 1:
        raise ValueError(f"beta is {settings.beta}, but must be between 0 and 1")
    tokens, hidden = x.shape
    vocab = student.weight.shape[-1]
    expected = {"student.norm": (student.norm, (hidden,)), "student.weight": (student.weight, (hidden, vocab))}
    checks.shapes(f"x of shape {x.shape}", expected)
    if reference.teacher is not None and reference.y is not None:
        y, (norm, weight) = reference.y, reference.teacher
        checks.shapes(f"x of shape {x.shape}", {"y": (y, (tokens, y.shape[1]))})
        expected = {"teacher.norm": (norm, (y.shape[1],)), "teacher.weight": (weight, (y.shape[1], vocab))}
        checks.shapes(f"y of shape {y.shape} beside a student of {vocab} words", expected)
    if reference.targets is not None:
        checks.shapes(f"x of shape {x.shape}", {"targets": (reference.targets, (tokens,))})
    if reference.top_k is not None:
        ids, logits, log_total = reference.top_k
        k = ids.shape[-1]
        expected = {"ids": (ids, (tokens, k)), "logits": (logits, (tokens, k)), "log_total": (log_total, (tokens,))}
        checks.shapes(f"x of shape {x.shape}", {f"top_k.{name}": pair for name, pair in expected.items()})
        if not 1 <= k <= vocab:
            raise ValueError(f"top_k has {k} tokens per row, but must have from 1 to the {vocab} of student.weight")
