"""What a distillation needs on every device, found without weights and without accelerators.

The step that `train.distill` runs is traced with arrays that have shapes, dtypes and places on a mesh, but no values,
and compiled for virtual devices. What is resident, masters, optimiser state and batch are exact. Temporaries are what
XLA's compiler for CPUs allots, of a program that is kept like an accelerator's in three ways:

    experts    grouped matmuls stand in it by their operands and results alone (`kernel_shapes`); the way for CPUs would
               lay one expert's matrices beside every block of rows
    bfloat16   is float16, which is as wide; CPUs would hold what they compute in bfloat16 in float32
    order      what rematerialisation fences off stays fenced off; XLA for CPUs would merge a layer's two passes again

An accelerator's compiler orders operations and reuses memory in its own way; `train.plan_arithmetic` has other figures
to stand beside these.

Left out: what a runtime takes for itself, fragmentation and collectives' buffers; evaluation, which needs less than a
step; what `ragged_dot` allots on GPUs for which XLA has no grouped matmul; freed routers and experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS, grouped
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, decode
from puzzle_jax.model.child import Child
from puzzle_jax.model.sharding import make_training_mesh, on_mesh, stacked_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, ParamSpec, is_spec, param_specs
from puzzle_jax.train.distill_recipe import MeshSettings
from puzzle_jax.train.objectives import FROM_TEACHER, HIDDEN, Distillation, Fixed, LossSettings
from puzzle_jax.train.optimizer import OptimizerSettings, make_optimizer
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Shardings, Step, TrainState, init_state, make_step
from puzzle_jax.train.student import Student

DTYPE = jnp.float16
"""In place of bfloat16, which accelerators compute in."""

WIDTH, FLOAT32 = 2, 4
"""Bytes of a number in what is computed in, and in masters."""

COMPILER = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
"""Options for a program that never runs: nothing of the machine code that a CPU would be given matters, and making it
takes longest."""

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
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but must be at least 1")
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


def check_packed(config: ModelConfig) -> None:
    """Raises ConfigError where experts of these sizes cannot be packed."""
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        if size % GROUP:
            raise ConfigError(f"{name} is {size}, but packed experts need a multiple of {GROUP}")


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


def bytes_beside(lowered: Any) -> int:
    """What a program of `jax.jit` allots on a device beside its arguments: temporaries, and results that do not take
    the place of an argument."""
    found = lowered.compile(compiler_options=COMPILER).memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


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
    state, (experts, others) = given.state, resident_bytes(given.fixed.resident)
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
    resident = jax.eval_shape(lambda: student.resident(_zeros(parent, packed)))
    return resident if mesh is None else in_place(resident, stacked_sharding(resident, parent, mesh))


def abstract_train_state(
    student: Student, resident: Params, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> tuple[TrainState, Shardings | None]:
    """The state before the first step, in place, and where that is."""

    def fresh(resident: Params) -> TrainState:
        return init_state(student.masters(resident), optimizer, jax.random.key(0))

    state = jax.eval_shape(fresh, resident)
    shardings = Placement(mesh).masters(state)
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


def in_place(tree: Any, shardings: Any) -> Any:
    """Arrays without values, of a tree and where its leaves lie."""
    return jax.tree.map(_put, tree, shardings)


def device_bytes(tree: Any) -> int:
    """Of one device's part of all arrays in a tree, or of their shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _zeros(config: ModelConfig, packed: bool) -> Params:
    """A model's parameters, to be traced."""

    def zeros(path: tuple[Any, ...], spec: ParamSpec) -> Array | MXFP4:
        if not packed or path[-1].key not in EXPERT_MATRICES:
            return jnp.zeros(spec.shape, DTYPE)
        experts, inputs, outputs = spec.shape
        codes, scales = (jnp.zeros((experts, outputs, inputs // each), jnp.uint8) for each in (2, GROUP))
        return MXFP4(codes, scales)

    return jax.tree_util.tree_map_with_path(zeros, param_specs(config), is_leaf=is_spec)


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


def _put(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(leaf: Any) -> int:
    """Of one device's part."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


# Experts by their shapes ----------------------------------------------------------------------------------------------


@contextmanager
def kernel_shapes() -> Iterator[None]:
    """Within, what is traced has grouped matmuls that read one row of one expert and give what nobody shall use, in the
    shapes and dtypes of a kernel's operands and results, forwards and backwards."""
    others = dict(IMPLEMENTATIONS)
    stand_in = partial(grouped.expert_outputs, kernel=_block_matmul, block_rows=BLOCK_ROWS["ragged_dot"])
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update({"kernel_shapes": stand_in, **others})
    try:
        yield
    finally:
        IMPLEMENTATIONS.clear()
        IMPLEMENTATIONS.update(others)


def _block_matmul(
    rows: Float[Array, "padded inputs"],
    weights: Float[Array, "experts first second"] | MXFP4,
    expert: Int[Array, "blocks"],
    used: Int[Array, ""],
    *,
    transposed: bool = False,
) -> Float[Array, "padded outputs"]:
    parts = (weights.codes, weights.scales) if isinstance(weights, MXFP4) else (weights,)
    return _stand_in(rows, parts, transposed)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stand_in(rows: Array, parts: tuple[Array, ...], transposed: bool) -> Array:
    first = [part[:1] for part in parts]
    matrix = (decode(MXFP4(first[0], first[1]), rows.dtype) if len(first) == 2 else first[0].astype(rows.dtype))[0]
    one = matrix[:, 0] if transposed else matrix[0]
    # Fences, so that both are arrays and no part of what is computed before or after.
    rows = jax.lax.optimization_barrier(rows)
    return jax.lax.optimization_barrier(rows[:, :1] * one)


def _save(rows: Array, parts: tuple[Array, ...], transposed: bool) -> tuple[Array, tuple[Array, ...]]:
    return _stand_in(rows, parts, transposed), parts


def _backward(transposed: bool, parts: tuple[Array, ...], d_out: Array) -> tuple[Array, None]:
    return _stand_in(d_out, parts, not transposed), None


_stand_in.defvjp(_save, _backward)
