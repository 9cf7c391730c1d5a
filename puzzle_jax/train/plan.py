"""What a distillation needs on every device, found without weights and without accelerators.

The step that `train.distill` runs is traced with arrays that have a shape, a dtype and a place on a mesh, and no values,
and compiled for as many virtual devices. What is resident, masters, optimiser state and batch are exact. Temporaries are
what XLA's compiler for CPUs allots, with two changes to the program, which both keep it like an accelerator's:

    experts    grouped matmuls stand in it by their operands and results alone (`kernel_shapes`); the way for CPUs would
               lay one expert's matrices beside every block of rows
    order      what rematerialisation fences off stays fenced off until memory is allotted, where XLA for CPUs would
               merge both passes through a layer again

It still is a pessimist: matrices that CPUs multiply are kept in float32 as well. `by_arithmetic` says what the large
parts come to where layers are computed again one at a time and all is in its own dtype; an accelerator is between both.

Left out: what a runtime takes for itself, fragmentation, collectives' buffers; evaluation, which needs less than a step;
what XLA's `ragged_dot` allots on GPUs without a grouped matmul of cuDNN's; freed routers and experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS, grouped
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
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

DTYPE = jnp.bfloat16
"""What accelerators compute in."""

_WIDTH, _FLOAT32 = 2, 4  # bytes
_STEPS = 1_000_000  # of the schedule; no shape depends on it
# A program that never runs: nothing of the machine code that a CPU would be given matters, and making it takes longest.
_COMPILER = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}


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

    Raises ConfigError for numbers below 1, a mesh that does not divide rows or positions, experts that cannot be packed,
    and a cache without a loss that reads it or the other way round.
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
        for name in ("hidden_size", "intermediate_size"):
            if self.packed and getattr(self.parent, name) % GROUP:
                raise ConfigError(
                    f"{name} is {getattr(self.parent, name)}, but packed experts need a multiple of {GROUP}"
                )
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
    def asks_teacher(self) -> bool:
        """Whether a loss needs the teacher's pass."""
        return any(name in (*FROM_TEACHER, *HIDDEN) for name in self.loss.shares)


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
      masters, optimizer: float32 masters of what learns, and the optimiser's state.
      batch: all micro-batches of a step.
      temporaries: what XLA allots beside, gradients included.
      decoded: one layer's packed experts in bfloat16, as XLA's own grouped matmul needs them; 0 where none are packed.
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
        compiled = step.lower(*given).compile(compiler_options=_COMPILER)  # type: ignore[attr-defined]
    found = compiled.memory_analysis()
    beside = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return replace(placed_bytes(given), temporaries=beside, decoded=_decoded(job))


def abstract_step(job: PlannedJob, mesh: Mesh | None) -> tuple[Step, Arguments]:
    """The step of the job, and what it is given, in place."""
    student, placement = job.student, Placement(mesh)
    resident = jax.eval_shape(lambda: student.resident(_zeros(job.parent, job.packed)))
    if mesh is not None:
        resident = jax.tree.map(_put, resident, stacked_sharding(resident, job.parent, mesh))
    optimizer = make_optimizer(job.optimizer, _STEPS)

    def fresh(resident: Params) -> TrainState:
        return init_state(student.masters(resident), optimizer, jax.random.key(0))

    state = jax.eval_shape(fresh, resident)
    shardings = placement.masters(state)
    if shardings is not None:
        state = jax.tree.map(_put, state, shardings)
    step = make_step(
        Distillation(student, job.loss), optimizer, shardings=None if shardings is None else Shardings(shardings)
    )
    return step, Arguments(state, Fixed(resident), _batch(job, mesh))


def placed_bytes(given: Arguments) -> DeviceMemory:
    """Bytes per device of a step's arguments, without what the step adds; of arrays or their shapes."""
    by_matrix = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(given.fixed.resident):
        by_matrix[any(getattr(entry, "key", None) in EXPERT_MATRICES for entry in path)] += _bytes(leaf)

    def total(tree: Any) -> int:
        return sum(map(_bytes, jax.tree.leaves(tree)))

    state = given.state
    optimizer = total((state.step, state.optimizer, state.skipped))
    return DeviceMemory(
        by_matrix[True], by_matrix[False], total(state.params), optimizer, total(given.batch), temporaries=0, decoded=0
    )


# Temporaries by arithmetic --------------------------------------------------------------------------------------------


def by_arithmetic(job: PlannedJob, memory: DeviceMemory) -> dict[str, int]:
    """The large parts of a step's temporaries on one device, in bytes, where one layer is computed again at a time.

    Heads are whole on every device, because a loss walks through their columns in slices. A layer's experts may get all
    pairs of the tokens that are there, and attention keeps the weights of whole rows.
    """
    config, tokens = job.parent, job.tokens
    hidden, inter, layers = config.hidden_size, config.intermediate_size, config.num_layers
    heads = config.vocab_size * hidden
    shares = job.loss.shares
    models = 2 if any(name in FROM_TEACHER for name in shares) else 1
    parts = {
        "gradients, float32": memory.masters,
        "output heads and a gradient, whole": heads * (models * _WIDTH + _FLOAT32),
        "every layer's input": layers * tokens * hidden * _WIDTH,
        "hidden states of both models": 0,
        "one layer's attention": _attention(job),
        # Rows, gate and linear part, activation; outputs by row and by token.
        "one layer's experts": _padded_rows(job) * (hidden * (_WIDTH + 2 * _FLOAT32) + inter * (2 * _FLOAT32 + _WIDTH)),
    }
    if any(name in HIDDEN for name in shares):
        parts["hidden states of both models"] = 2 * layers * tokens * hidden * _WIDTH
    return {name: size for name, size in parts.items() if size}


def _attention(job: PlannedJob) -> int:
    """Weights that the largest layer keeps for its gradient, in float32 and once more to be multiplied."""
    mesh, config = job.mesh, job.parent
    cut = mesh.model * (mesh.sequence if config.num_heads % (mesh.model * mesh.sequence) == 0 else 1)
    heads = max(config.num_heads // cut, 1)
    length = job.row_length

    def visible(window: int | None) -> int:
        width = min(window or length, length)
        return length * width - width * (width - 1) // 2

    largest = max(visible(block.window) for block in job.child.blocks)
    return job.rows // mesh.data * heads * largest * (_FLOAT32 + _WIDTH)


def _pairs(job: PlannedJob) -> tuple[int, int]:
    """Of tokens and experts, at worst on one device; and the most experts that it holds of a layer."""
    most = max(block.num_experts for block in job.parent.blocks)
    held = most // job.mesh.model if most % job.mesh.model == 0 else most
    return job.tokens * job.parent.experts_per_token, held


def _padded_rows(job: PlannedJob) -> int:
    pairs, held = _pairs(job)
    block = BLOCK_ROWS["ragged_dot"](pairs, held, job.packed)
    return num_blocks(pairs, held, block) * block


def _decoded(job: PlannedJob) -> int:
    matrices = 3 * job.parent.hidden_size * job.parent.intermediate_size
    return _pairs(job)[1] * matrices * _WIDTH if job.packed else 0


def added_by_cpu(job: PlannedJob) -> dict[str, int]:
    """What compiling for CPUs adds, in bytes, to "temporaries", and what it would add and is left out of them."""
    heads = job.parent.vocab_size * job.parent.hidden_size
    models = 2 if any(name in FROM_TEACHER for name in job.loss.shares) else 1
    pairs, held = _pairs(job)
    block = BLOCK_ROWS["blocked"](pairs, held, job.packed)
    gathered = num_blocks(pairs, held, block) * 3 * job.parent.hidden_size * job.parent.intermediate_size * _WIDTH
    return {"heads": heads * models * (_FLOAT32 - _WIDTH), "gathered": gathered}


# What would do --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A job that would fit, and what it needs, about."""

    what: str
    job: PlannedJob
    total: int


def changes(job: PlannedJob, memory: DeviceMemory, limit: int) -> list[Change]:
    """For each way to need less, the least change with which a job should fit into `limit` bytes per device; ways that
    cannot do it alone are left out."""
    found = []
    for what, fields_ in (
        ("smaller micro-batches, more of them", ("rows", "micro_batches")),
        ("shorter rows", ("row_length",)),
        ("more devices, each with fewer rows", ("mesh.data",)),
        ("more devices, each with a part of every row", ("mesh.sequence",)),
        ("more devices, each with fewer experts and heads", ("mesh.model",)),
    ):
        for factor in (2**power for power in range(1, 11)):
            try:
                other = _scaled(job, fields_, factor)
            except ConfigError:
                break
            total = estimated(job, memory, other).total
            if total <= limit:
                found.append(Change(what, other, total))
                break
    return found


def _scaled(job: PlannedJob, names: tuple[str, ...], factor: int) -> PlannedJob:
    """With more devices or micro-batches, and fewer or shorter rows. Raises ConfigError where that is not whole."""
    values: dict[str, Any] = {}
    for name in names:
        if name.startswith("mesh."):
            axis = name.removeprefix("mesh.")
            size = getattr(job.mesh, axis) * factor
            if axis == "model" and any(block.num_experts % size for block in job.parent.blocks):
                raise ConfigError(f"{name} is {size}, which does not divide the experts")
            values["mesh"] = replace(job.mesh, **{axis: size})
        elif name == "micro_batches":
            values[name] = job.micro_batches * factor
        else:
            if getattr(job, name) % factor:
                raise ConfigError(f"{name} is {getattr(job, name)}, which {factor} does not divide")
            values[name] = getattr(job, name) // factor
    return replace(job, **values)


def estimated(job: PlannedJob, memory: DeviceMemory, other: PlannedJob) -> DeviceMemory:
    """About what another job needs, by what this one does.

    Temporaries beside gradients go with the tokens of a device, down to what the output heads take.
    """
    devices = job.mesh.devices / other.mesh.devices
    model = job.mesh.model / other.mesh.model
    rows = other.rows * other.row_length * other.micro_batches / (job.rows * job.row_length * job.micro_batches)
    gradients = memory.masters
    beside = memory.temporaries - gradients
    least = min(beside, _FLOAT32 * 3 * job.parent.vocab_size * job.parent.hidden_size)
    return DeviceMemory(
        experts=math.ceil(memory.experts * model),
        resident=math.ceil(memory.resident * model),
        masters=math.ceil(memory.masters * devices),
        optimizer=math.ceil(memory.optimizer * devices),
        batch=math.ceil(memory.batch * rows * devices * (other.mesh.model / job.mesh.model)),
        temporaries=math.ceil(gradients * devices + max(beside * other.tokens / job.tokens, least)),
        decoded=_decoded(other),
    )


# Arrays without values ------------------------------------------------------------------------------------------------


def _zeros(config: ModelConfig, packed: bool) -> Params:
    """A model's parameters, to be traced."""

    def zeros(path: tuple[Any, ...], spec: ParamSpec) -> Array | MXFP4:
        if not packed or path[-1].key not in EXPERT_MATRICES:
            return jnp.zeros(spec.shape, DTYPE)
        experts, inputs, outputs = spec.shape
        codes, scales = (jnp.zeros((experts, outputs, inputs // each), jnp.uint8) for each in (2, GROUP))
        return MXFP4(codes, scales)

    return jax.tree_util.tree_map_with_path(zeros, param_specs(config), is_leaf=is_spec)


def _batch(job: PlannedJob, mesh: Mesh | None) -> Any:
    sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(None, "data", "sequence"))

    def array(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        shape = (job.micro_batches, job.rows, job.row_length, *more)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    extras = {}
    if job.top_k is not None:
        extras = {
            "teacher_ids": array(jnp.int32, job.top_k),
            "teacher_logits": array(jnp.float16, job.top_k),
            "teacher_log_total": array(jnp.float32),
        }
    whole, weights = array(jnp.int32), array(jnp.float32)
    # Through a tree, since annotations of `Packed` ask for arrays.
    like = jax.tree.structure(Packed(*[0] * 5, dict.fromkeys(extras, 0)))  # type: ignore[arg-type]
    leaves = [whole, whole, weights, whole, whole, *(extras[name] for name in sorted(extras))]
    return jax.tree.unflatten(like, leaves)


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
    first = tuple(part[:1] for part in parts)
    matrix = (decode(MXFP4(*first), rows.dtype) if len(first) > 1 else first[0].astype(rows.dtype))[0]
    one = matrix[:, 0] if transposed else matrix[0]
    # Fences, so that both are arrays and no part of what is computed before or after.
    rows = jax.lax.optimization_barrier(rows)
    return jax.lax.optimization_barrier(rows[:, :1] * one)


def _save(rows: Array, parts: tuple[Array, ...], transposed: bool) -> tuple[Array, tuple[Array, ...]]:
    return _stand_in(rows, parts, transposed), parts


def _backward(transposed: bool, parts: tuple[Array, ...], d_out: Array) -> tuple[Array, None]:
    return _stand_in(d_out, parts, not transposed), None


_stand_in.defvjp(_save, _backward)
