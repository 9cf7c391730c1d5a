"""The memory that a distillation needs on every device, found without weights and without accelerators.

The step that `train.distill.run` runs is compiled for virtual devices, as `plan.abstract` says. The base parameters,
master weights, optimizer state and batch are exact; `plan.training` also calculates temporaries by arithmetic.

Left out: evaluation, which needs less than a step; trainable experts; and what `plan.abstract` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.plan.abstract import bytes_beside, device_bytes, kernel_shapes
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.record import GB, Change, Usage, least_changes, scaled
from puzzle_jax.plan.training import Extra, PlannedTraining
from puzzle_jax.train.distill.objectives import FROM_TEACHER, HIDDEN, Distillation
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import make_step

STEP = "step"

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "experts_per_token",
    "num_layers",
)  # fmt: skip


class PlannedDistillation(PlannedTraining[DistillRecipe]):
    """A distillation, as far as memory depends on it."""

    @property
    def rows(self) -> tuple[int, int, int]:
        data = self.recipe.data
        return data.micro_batches, data.rows, data.row_length

    @property
    def losses(self) -> Iterable[str]:
        return self.recipe.loss.shares

    @property
    def batch(self) -> Packed:
        """All micro-batches of a step, without values."""
        top_k, extras = self.recipe.top_k, dict[str, Extra]()
        if self.recipe.teacher_cache is not None:
            extras = {
                "teacher_ids": (jnp.int32, top_k),
                "teacher_logits": (jnp.float16, top_k),
                "teacher_log_total": (jnp.float32,),
            }
        where = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(None, "data", "sequence"))
        return self.abstract_rows(self.rows, where, extras)

    @cached_property
    def held(self) -> dict[str, int]:
        """Bytes on one device of what a step is given, and of a layer's decoded experts."""
        return {**self.always_held, "batch": device_bytes(self.batch), "decoded": self.decoded}

    @property
    def asks_teacher(self) -> bool:
        """Returns whether a loss needs the teacher's pass."""
        return any(name in (*FROM_TEACHER, *HIDDEN) for name in self.losses)

    # What a plan is made of -------------------------------------------------------------------------------------------

    @property
    def about(self) -> list[str]:
        recipe, (micro_batches, rows, length) = self.recipe, self.rows
        return [
            f"{recipe.parent.name} -> {recipe.child.name} on {self.on_devices}, "
            f"{micro_batches} x {rows} rows of {length:,} tokens a step"
        ]

    @property
    def programs(self) -> dict[str, Callable[[], Usage]]:
        return {STEP: self._step}

    def _step(self) -> Usage:
        """Compiles the step, which takes a minute for a model of 36 layers."""
        state, shardings = self.state
        step = make_step(Distillation(self.student, self.recipe.loss), self.optimizer, shardings=shardings)
        with on_mesh(self.mesh), kernel_shapes():
            temporaries = bytes_beside(step.lower(state, self.fixed, self.batch))  # type: ignore[attr-defined]
        return Usage(self.held, temporaries, self.temporaries(self.held["master_weights"]))

    def changes(self, found: Mapping[str, Usage], program: str, limit: int) -> list[Change]:
        """Changes that would make a step fit, and what a teacher's cache would save."""
        ways = {
            "smaller micro-batches, more of them": scaled(self.recipe, ("data.rows",), ("data.micro_batches",)),
            "shorter rows": scaled(self.recipe, ("data.row_length",)),
            **self.device_ways("data.rows"),
        }

        def total(recipe: DistillRecipe) -> int:
            return self.estimated(found[program], replace(self, recipe=recipe)).total

        return [*least_changes(self.recipe, ways, total, limit), Change(self._about_teacher_cache())]

    def _about_teacher_cache(self) -> str:
        if not self.asks_teacher:
            return "the teacher is not asked; its experts stay, since they are the student's, too"
        if any(name in HIDDEN for name in self.losses):
            return "a teacher's cache has no hidden states, so these losses need the teacher itself"
        saved = 2 * self.parent.vocab_size * self.parent.hidden_size / GB
        return f"a teacher's cache would save its pass, but only its head of memory, up to {saved:.1f} GB"

    @property
    def notes(self) -> list[str]:
        gathered = f"{self.gathered_on_cpus / GB:.1f} GB of matrices that a CPU alone would gather for blocks of rows"
        by_arithmetic = "by arithmetic: large parts alone, one layer at a time"
        return [compiler().about, by_arithmetic, f"left out: {gathered}", *super().notes]


def first_experts(parent: ModelConfig, child: ModelConfig, parent_path: Path, child_path: Path) -> Child:
    """A child as a view that keeps the first of its parent's experts. Raises ConfigError for another parent's child."""
    for name in _SHARED:
        own, of_parent = getattr(child, name), getattr(parent, name)
        if own != of_parent:
            raise ConfigError(f"{child_path}: {name} is {own}, but its parent {parent_path} has {of_parent}")
    for layer, (own, of_parent) in enumerate(zip(child.blocks, parent.blocks, strict=True)):
        if own.num_experts > of_parent.num_experts:
            raise ConfigError(
                f"{child_path}: layer {layer} has {own.num_experts} experts, "
                f"but its parent {parent_path} has only {of_parent.num_experts} there"
            )
    blocks = tuple(ChildBlock(tuple(range(block.num_experts)), block.window) for block in child.blocks)
    return Child(parent, blocks, rope=None if child.rope == parent.rope else child.rope)
