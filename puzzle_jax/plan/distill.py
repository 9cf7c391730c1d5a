"""What a distillation needs on every device, found without weights and without accelerators.

The step that `train.distill.run` runs is compiled for virtual devices, as `plan.programs` says. What is resident,
masters, optimiser state and batch are exact; beside temporaries, `plan.distill_arithmetic` has other figures.

Left out: evaluation, which needs less than a step; freed routers and experts; and what `plan.programs` leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import MOST_TOKENS, ConfigError, check_range
from puzzle_jax.model.child import Child
from puzzle_jax.model.sharding import make_training_mesh, on_mesh, stacked_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params
from puzzle_jax.plan.programs import (
    WIDTH,
    bytes_beside,
    check_packed,
    device_bytes,
    in_place,
    kernel_shapes,
    zero_params,
)
from puzzle_jax.train.distill.objectives import FROM_TEACHER, HIDDEN, Distillation, Fixed, LossSettings
from puzzle_jax.train.distill.recipe import MeshSettings
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Shardings, Step, TrainState, init_state, make_step
from puzzle_jax.train.student import Student

STEPS = 1_000_000
"""Of a schedule; no shape depends on it."""


Extra = tuple[Any, *tuple[int, ...]]
"""Of an array that rows carry: its dtype, and dimensions after those of positions."""


@dataclass(frozen=True)
class PlannedJob:
    """A distillation, as far as memory depends on it.

    Attributes:
      child: a view on its parent; which experts it keeps does not matter, nor how many.
      packed: whether the resident experts are MXFP4, as the parent's checkpoint has them, or bfloat16.
      mesh: devices.
      row_length, rows, micro_batches: of a step's batch, rows by micro-batch.
      loss: terms.
      top_k: tokens per position of a teacher's cache; None: the teacher itself is asked.
      optimizer: whose state there is.

    Raises ConfigError for numbers below 1, a mesh that does not divide rows or positions, experts that cannot be
    packed, and a cache without a loss that reads it or the other way round.
    """

    child: Child
    packed: bool = True
    mesh: MeshSettings = field(default_factory=MeshSettings)
    row_length: int = 4096
    rows: int = 8
    micro_batches: int = 1
    loss: LossSettings = field(default_factory=LossSettings)
    top_k: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        for name in ("row_length", "rows", "micro_batches", "top_k"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, 1, MOST_TOKENS)
        for name, axis in (("rows", "data"), ("row_length", "sequence")):
            value, devices = getattr(self, name), getattr(self.mesh, axis)
            if value % devices:
                raise ConfigError(f"{name} is {value}, but must be a multiple of mesh.{axis} ({devices})")
        if self.packed:
            check_packed(self.parent)
        if (self.loss.top_k_kl > 0) != (self.top_k is not None):
            raise ConfigError(
                f"loss.top_k_kl is {self.loss.top_k_kl} and a teacher's cache is "
                f"{'used' if self.top_k else 'not used'}, but the one needs the other"
            )

    @property
    def parent(self) -> ModelConfig:
        return self.child.parent

    @cached_property
    def student(self) -> Student:
        return Student(self.child)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, that one device holds; devices of the model axis hold the same."""
        return self.rows // self.mesh.data * (self.row_length // self.mesh.sequence)

    @property
    def pairs(self) -> int:
        """Of tokens and experts, that one device may have to compute in a layer: all of its tokens'."""
        return self.tokens * self.parent.experts_per_token

    @property
    def held_experts(self) -> int:
        """Of the parent's largest layer, that one device holds."""
        return held_experts(self.parent, self.mesh)

    @property
    def decoded(self) -> int:
        """Bytes of what a device holds of that layer's experts, in bfloat16; 0 where they are not packed."""
        return decoded_bytes(self.parent, self.mesh) if self.packed else 0

    @property
    def asks_teacher(self) -> bool:
        """Whether a loss needs the teacher's pass."""
        return any(name in (*FROM_TEACHER, *HIDDEN) for name in self.loss.shares)


def expert_numbers(config: ModelConfig) -> int:
    """Of one expert's matrices."""
    return 3 * config.hidden_size * config.intermediate_size


def held_experts(config: ModelConfig, mesh: MeshSettings) -> int:
    """Of the largest layer, that one device holds."""
    most = max(block.num_experts for block in config.blocks)
    return most // mesh.model if most % mesh.model == 0 else most


def decoded_bytes(config: ModelConfig, mesh: MeshSettings) -> int:
    """Of what one device holds of the largest layer's packed experts, once they are bfloat16."""
    return held_experts(config, mesh) * expert_numbers(config) * WIDTH


class Arguments(NamedTuple):
    """What a step is given, as `jax.ShapeDtypeStruct`."""

    state: TrainState
    fixed: Fixed
    batch: Packed


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one device while a step runs.

    Attributes:
      experts, resident: of the resident parent, the matrices of its experts and all else.
      masters, optimizer: float32 masters of what learns, and the optimiser's state with all counters.
      batch: all micro-batches of a step.
      temporaries: what XLA allots beside, gradients included.
      decoded: one layer's packed experts in bfloat16, for grouped matmuls of XLA, which read no packed ones; 0 where
        none are packed.
    """

    experts: int
    resident: int
    masters: int
    optimizer: int
    batch: int
    temporaries: int
    decoded: int

    @property
    def arguments(self) -> int:
        """What is there between steps."""
        return self.experts + self.resident + self.masters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


def plan(job: PlannedJob) -> DeviceMemory:
    """Compiles the step for virtual devices. Takes a minute for a model of 36 layers.

    Raises ConfigError where JAX has fewer devices than the mesh.
    """
    mesh = None
    if job.mesh.devices > 1:
        mesh = make_training_mesh(job.mesh.data, job.mesh.sequence, job.mesh.model)
    step, given = abstract_step(job, mesh)
    with on_mesh(mesh), kernel_shapes():
        lowered = step.lower(*given)  # type: ignore[attr-defined]
        return replace(placed_bytes(given), temporaries=bytes_beside(lowered), decoded=job.decoded)


def abstract_step(job: PlannedJob, mesh: Mesh | None) -> tuple[Step, Arguments]:
    """The step of the job, and what it is given, in place."""
    student = job.student
    resident = abstract_resident(student, job.packed, mesh)
    optimizer = make_optimizer(job.optimizer, STEPS)
    state, shardings = abstract_train_state(student, resident, optimizer, mesh)
    step = make_step(Distillation(student, job.loss), optimizer, shardings=shardings)
    return step, Arguments(state, Fixed(resident), _batch(job, mesh))


def placed_bytes(given: Arguments) -> DeviceMemory:
    """Bytes per device of a step's arguments, without what the step adds; of arrays or their shapes."""
    state, (experts, others) = given.state, resident_bytes(given.fixed.base)
    return DeviceMemory(
        experts=experts,
        resident=others,
        masters=device_bytes(state.params),
        optimizer=device_bytes(state._replace(params=None)),
        batch=device_bytes(given.batch),
        temporaries=0,
        decoded=0,
    )


def resident_bytes(resident: Params) -> tuple[int, int]:
    """Per device, of the matrices of a model's experts and of all else."""
    by_matrix = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(resident):
        by_matrix[any(getattr(entry, "key", None) in EXPERT_MATRICES for entry in path)] += device_bytes(leaf)
    return by_matrix[True], by_matrix[False]


# Arrays without values ------------------------------------------------------------------------------------------------


def abstract_resident(student: Student, packed: bool, mesh: Mesh | None) -> Params:
    """The student's parent as training holds it, stacked, in place."""
    parent = student.child.parent
    resident = jax.eval_shape(lambda: student.stacked(zero_params(parent, packed)))
    return resident if mesh is None else in_place(resident, stacked_sharding(resident, parent, mesh))


def abstract_train_state(
    student: Student, resident: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> tuple[TrainState, Shardings | None]:
    """The state before the first step, in place, and where that is."""

    def fresh(resident: Params) -> TrainState:
        return init_state(student.master_weights(resident), optimizer, jax.random.key(0))

    state = jax.eval_shape(fresh, resident)
    shardings = Placement(mesh).master_weights(state)
    if shardings is None:
        return state, None
    return in_place(state, shardings), Shardings(shardings)


def abstract_rows(shape: tuple[int, ...], sharding: NamedSharding | None, extras: Mapping[str, Extra]) -> Packed:
    """Packed rows of this shape, with extras of each a dtype and further dimensions."""

    def array(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)

    whole, weights = array(jnp.int32), array(jnp.float32)
    # Through a tree, since annotations of `Packed` ask for arrays.
    like = jax.tree.structure(Packed(*[0] * 5, dict.fromkeys(extras, 0)))  # type: ignore[arg-type]
    leaves = [whole, whole, weights, whole, whole, *(array(*extras[name]) for name in sorted(extras))]
    return jax.tree.unflatten(like, leaves)


def _batch(job: PlannedJob, mesh: Mesh | None) -> Packed:
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, "data", "sequence"))
    extras: dict[str, Extra] = {}
    if job.top_k is not None:
        extras = {
            "teacher_ids": (jnp.int32, job.top_k),
            "teacher_logits": (jnp.float16, job.top_k),
            "teacher_log_total": (jnp.float32,),
        }
    return abstract_rows((job.micro_batches, job.rows, job.row_length), sharding, extras)
