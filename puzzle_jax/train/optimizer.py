"""Optimisers and learning-rate schedules, built from settings.

    updates = -rate(n) * (direction(clip(gradients)) + weight_decay * params)        n: updates made so far

Weight decay is decoupled (arXiv 1711.05101) and applies to matrices only. Since layers may be stacked, matrices are
recognised by name rather than by number of axes: norms, biases and sinks do not decay. Directions come from optax. Muon
(arXiv 2502.16982) updates the matrices of layers, each expert and layer separately; the embedding, the head and
parameters that are not matrices then take Adam's direction with Nesterov momentum; both updates are of similar size.

Left out: per-parameter learning rates, and moments in lower precision than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from puzzle_jax.errors import MOST_TIMES, ConfigError, check_choice, check_range

OPTIMIZERS = ("adamw", "adam", "sgd", "lion", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd")

Schedule = Callable[[ArrayLike], Float[Array, ""]]


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimiser and of its learning-rate schedule.

    Attributes:
      name: "adamw", "sgd", "lion", "muon", or "adam", which is "adamw" without weight decay.
      learning_rate: peak learning rate of the schedule.
      schedule: shape after the warmup: "constant"; "cosine" or "linear", which decay until the last step; or "wsd"
        (warmup, stable, decay), constant until a linear decay over the last `decay_fraction` of the steps.
      warmup_steps: steps over which the rate rises linearly; the first step is already above 0.
      final_fraction: fraction of `learning_rate` at which decaying schedules end.
      decay_fraction: fraction of all steps over which "wsd" decays.
      b1, b2, eps: coefficients of the moments; `b1` is also the momentum of "sgd" (0 means none) and "muon".
      weight_decay: decoupled weight decay, which is multiplied by the learning rate.
      clip_norm: global norm above which gradients are scaled down to it; None does not clip.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, OPTIMIZERS)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "eps", "clip_norm"):
            if (value := getattr(self, name)) is not None:
                check_range(f"optimizer.{name}", value, 0, above=True)
        check_range("optimizer.warmup_steps", self.warmup_steps, 0, MOST_TIMES)
        check_range("optimizer.weight_decay", self.weight_decay, 0)
        for name in ("b1", "b2"):
            check_range(f"optimizer.{name}", getattr(self, name), 0, 1, below=True)
        for name in ("final_fraction", "decay_fraction"):
            check_range(f"optimizer.{name}", getattr(self, name), 0, 1)
        if self.name == "adam" and self.weight_decay:
            raise ConfigError(f"optimizer.weight_decay is {self.weight_decay}, but adam has none; adamw does")


def make_schedule(settings: OptimizerSettings, steps: int) -> Schedule:
    """Returns the schedule, from the number of updates made so far to the learning rate of the next.

    Raises ConfigError where the warmup is longer than `steps`.
    """
    warmup = settings.warmup_steps
    if warmup > steps:
        raise ConfigError(f"optimizer.warmup_steps is {warmup}, but must be at most the {steps} updates of the run")
    start = steps - decay_steps(settings, steps)

    def rate(count: ArrayLike) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        rise = jnp.minimum((count + 1) / warmup, 1.0) if warmup else jnp.float32(1)
        fallen = jnp.clip((count - start) / max(steps - start, 1), 0.0, 1.0)
        if settings.schedule == "constant":
            fallen = jnp.float32(0)
        elif settings.schedule == "cosine":
            fallen = (1 - jnp.cos(jnp.pi * fallen)) / 2
        return settings.learning_rate * rise * (1 - (1 - settings.final_fraction) * fallen)

    return rate


def decay_steps(settings: OptimizerSettings, steps: int) -> int:
    """Number of steps at the end of a run over which a decaying schedule decays."""
    after_warmup = steps - settings.warmup_steps
    if settings.schedule != "wsd":
        return after_warmup
    return min(max(round(steps * settings.decay_fraction), 1), after_warmup)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps` updates; None leaves of parameters have no state.

    Raises ConfigError where the warmup is longer than `steps`.
    """
    parts = [] if settings.clip_norm is None else [optax.clip_by_global_norm(settings.clip_norm)]
    parts.append(_direction(settings))
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay, decays))
    return optax.chain(*parts, _descend(make_schedule(settings, steps)))


def decays(params: PyTree) -> PyTree:
    """Marks parameters that decay, the matrices, by name: a tree of bool in the structure of `params`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(_name(path)), params)


class Rate(NamedTuple):
    """State of the last part of an optimiser.

    Attributes:
      count: number of updates made.
      learning_rate: learning rate of the last one.
    """

    count: Int[Array, ""]
    learning_rate: Float[Array, ""]


def _descend(schedule: Schedule) -> optax.GradientTransformation:
    """Scales updates by minus the learning rate, which it keeps in the state for the metrics."""

    def init(params: PyTree) -> Rate:
        return Rate(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, Rate]:
        rate = schedule(state.count)
        return jax.tree.map(lambda update: -rate * update, updates), Rate(state.count + 1, rate)

    return optax.GradientTransformation(init, update)


def _direction(settings: OptimizerSettings) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    if settings.name == "sgd":
        return optax.trace(settings.b1) if settings.b1 else optax.identity()
    if settings.name == "lion":
        return optax.scale_by_lion(settings.b1, settings.b2)
    if settings.name == "muon":
        # 0.2 times the root of the larger side gives updates the size of Adam's (arXiv 2502.16982, section 2.2).
        matrices = optax.contrib.MuonDimensionNumbers(-2, -1)  # the last two axes; those before index matrices
        return optax.contrib.muon(
            -1.0,  # undoes Muon's own change of sign, since `_descend` makes one
            beta=settings.b1,
            eps=settings.eps,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: matrices if _is_layer_matrix(path) else None, params
            ),
        )
    return adam


def _name(path: jax.tree_util.KeyPath) -> str:
    """The parameter's own name in `model.spec`, without the list indices and fields of packed matrices in its path."""
    return next((entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey)), "")


def _is_matrix(name: str) -> bool:
    return name != "sinks" and not name.endswith(("norm", "_bias"))


def _is_layer_matrix(path: jax.tree_util.KeyPath) -> bool:
    return _is_matrix(_name(path)) and _name(path) not in ("embedding", "head")
