"""The arrays of distillation and reinforcement learning on a device: base parameters, master weights, rows,
and the large parts of a step's temporaries by arithmetic, from which other shapes are estimated.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.files import Json
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.model.child import Child
from puzzle_jax.model.sharding import make_training_mesh, stacked_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params
from puzzle_jax.plan.abstract import FLOAT32, WIDTH, check_packed, device_bytes, in_place, zero_params
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.record import Usage, scaled
from puzzle_jax.train.distill.objectives import FROM_TEACHER, HIDDEN, Fixed
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Shardings, TrainState, init_state
from puzzle_jax.train.student import Student

STEPS = 1_000_000
"""Length of a schedule; no shape depends on it."""

Extra = tuple[DTypeLike, *tuple[int, ...]]
"""An array that rows carry: its dtype, and dimensions after those of positions."""

_SUMS = "sums of gradients, float32"
_STUDENT = "student and gradients of a micro-batch, bfloat16"
_HEADS = "output heads and a gradient, not sharded"

AnyRecipe = TypeVar("AnyRecipe", DistillRecipe, GrpoRecipe)


@dataclass(frozen=True)
class PlannedTraining(ABC, Generic[AnyRecipe]):
    """A run of training, as far as memory depends on it.

    Attributes:
      child: the view that is trained; neither which of its parent's experts it keeps nor how many matters.
      recipe: all settings; files that it names are not read.
      packed: whether the parent's checkpoint has packed experts; they stay packed unless the recipe wants them dense.

    Raises ConfigError for experts that are to be trained, or cannot be packed.
    """

    child: Child
    recipe: AnyRecipe
    packed: bool = True

    def __post_init__(self) -> None:
        if "experts" in self.recipe.train:
            raise ConfigError("train has 'experts', but a plan is for experts that are frozen")
        object.__setattr__(self, "packed", self.packed and self.recipe.weights != "dense")
        if self.packed:
            check_packed(self.parent)

    @property
    @abstractmethod
    def rows(self) -> tuple[int, int, int]:
        """Micro-batches of a step, rows of each, and positions of a row."""

    @property
    @abstractmethod
    def losses(self) -> Iterable[str]:
        """Terms of a distillation's loss that are not 0."""

    @property
    def parent(self) -> ModelConfig:
        return self.child.parent

    # What is held at all times, without values ------------------------------------------------------------------------

    @cached_property
    def student(self) -> Student:
        dense = self.recipe.dense if isinstance(self.recipe, DistillRecipe) else True
        return Student(self.child, self.recipe.train, self.recipe.remat, dense=dense)

    @cached_property
    def mesh(self) -> Mesh | None:
        """The mesh; None for a single device of this process. Raises ConfigError where JAX has fewer devices."""
        mesh = self.recipe.mesh
        devices = compiler().devices(mesh.devices)
        if mesh.devices == 1 and not devices:
            return None
        return make_training_mesh(mesh.data, mesh.sequence, mesh.model, devices)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.recipe.optimizer, STEPS)

    @cached_property
    def fixed(self) -> Fixed:
        """The student's parent as training holds it, stacked and sharded, without values."""
        base = jax.eval_shape(lambda: self.student.stacked(zero_params(self.parent, self.packed)))
        return Fixed(base if self.mesh is None else in_place(base, stacked_sharding(base, self.parent, self.mesh)))

    @cached_property
    def state(self) -> tuple[TrainState, Shardings | None]:
        """The state before the first step, without values, and its shardings."""

        def fresh(base: Params) -> TrainState:
            return init_state(self.student.master_weights(base), self.optimizer, jax.random.key(0))

        state = jax.eval_shape(fresh, self.fixed.base)
        shardings = Placement(self.mesh).master_weights(state)
        return (state, None) if shardings is None else (in_place(state, shardings), Shardings(shardings))

    @cached_property
    def always_held(self) -> dict[str, int]:
        """Bytes on one device of what is held at all times."""
        state, by_matrix = self.state[0], {True: 0, False: 0}
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.fixed.base):
            by_matrix[any(getattr(entry, "key", None) in EXPERT_MATRICES for entry in path)] += device_bytes(leaf)
        return {
            "experts": by_matrix[True],
            "base": by_matrix[False],
            "master_weights": device_bytes(state.params),
            "optimizer": device_bytes(state._replace(params=None)),
        }

    def abstract_rows(self, shape: tuple[int, ...], where: NamedSharding | None, extras: Mapping[str, Extra]) -> Packed:
        """Packed rows of this shape, without values, with these extras."""

        def array(dtype: DTypeLike, *more: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=where)

        ids, weights = array(jnp.int32), array(jnp.float32)
        return Packed._make([ids, ids, weights, ids, ids, {name: array(*of) for name, of in extras.items()}])

    # What a plan is made of -------------------------------------------------------------------------------------------

    @property
    def on_devices(self) -> str:
        mesh = self.recipe.mesh
        return f"{mesh.data} x {mesh.sequence} x {mesh.model} devices"

    @property
    def labels(self) -> dict[str, str]:
        return {
            "experts": f"base parameters, experts, {'MXFP4' if self.packed else 'bfloat16'}",
            "base": "base parameters, all else, bfloat16",
            "master_weights": "master weights, float32",
            "optimizer": f"optimizer state, {self.recipe.optimizer.name}",
            "batch": "batch",
            "decoded": "one layer's experts, decoded",
        }

    @property
    def notes(self) -> list[str]:
        model = self.recipe.mesh.model
        undivided = [block.num_experts for block in self.parent.blocks if block.num_experts % model]
        return [f"every device holds all experts: {model} devices do not divide {count}" for count in undivided[:1]]

    def device_ways(self, rows: str) -> dict[str, Iterable[Mapping[str, Json]]]:
        """Meshes of more devices; every device of the data axis keeps a row. `rows` is the dotted name of a setting."""
        more_data = (
            {**settings, **({rows: settings["mesh.data"]} if self.rows[1] % settings["mesh.data"] else {})}
            for settings in scaled(self.recipe, doubled=("mesh.data",))
        )
        return {
            "more devices, each with fewer rows": more_data,
            "more devices, each with a part of every row": scaled(self.recipe, doubled=("mesh.sequence",)),
            "more devices, each with fewer experts and heads": scaled(self.recipe, doubled=("mesh.model",)),
        }

    # Arithmetic -------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that one device holds; devices of the model axis hold the same."""
        (_, rows, length), mesh = self.rows, self.recipe.mesh
        return rows // mesh.data * (length // mesh.sequence)

    @property
    def held_experts(self) -> int:
        """Experts of the parent's largest layer that one device holds."""
        most, model = max(block.num_experts for block in self.parent.blocks), self.recipe.mesh.model
        return most // model if most % model == 0 else most

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's matrices in bfloat16."""
        return 3 * self.parent.hidden_size * self.parent.intermediate_size * WIDTH

    @property
    def decoded(self) -> int:
        """Bytes of the largest layer's experts in bfloat16, for XLA's grouped matmuls, which cannot read packed ones; 0
        where they are not packed."""
        return self.held_experts * self.expert_bytes if self.packed else 0

    @property
    def gathered_on_cpus(self) -> int:
        """Bytes of expert matrices that only CPUs would gather, one for each block of rows; they are left out."""
        return self._blocks("blocked")[0] * self.expert_bytes

    def temporaries(self, master_bytes: int) -> dict[str, int]:
        """The large parts of a step's temporaries on one device, in bytes, where one layer at a time is recomputed.

        Heads are not sharded, because a loss walks through their columns in slices. A layer's experts may receive
        all token-expert pairs of the device's tokens, and attention keeps the weights of whole rows. `master_bytes` are
        the bytes of master weights on one device.
        """
        hidden, inter, mesh = self.parent.hidden_size, self.parent.intermediate_size, self.recipe.mesh
        states = self.parent.num_layers * self.tokens * hidden * WIDTH
        heads = 2 if any(name in FROM_TEACHER for name in self.losses) else 1
        learning = master_bytes * mesh.devices // FLOAT32  # parameters, all devices together
        # Per padded row: the row, gate and linear part, activation, and outputs by expert and by token.
        of_experts = hidden * (WIDTH + 2 * FLOAT32) + inter * (2 * FLOAT32 + WIDTH)
        blocks, block = self._blocks("looped")
        parts = {
            _SUMS: master_bytes,
            _STUDENT: 2 * learning * WIDTH // mesh.model,
            _HEADS: self.parent.vocab_size * hidden * (heads * WIDTH + FLOAT32),
            "input of every layer": states,
            "hidden states of both models": 2 * states if any(name in HIDDEN for name in self.losses) else 0,
            "attention of one layer": self._attention(),
            "experts of one layer": blocks * block * of_experts,
        }
        return {name: size for name, size in parts.items() if size}

    def _attention(self) -> int:
        """Bytes of the attention weights that the largest layer keeps for its gradient, in float32 and in bfloat16."""
        (_, rows, length), mesh, config = self.rows, self.recipe.mesh, self.parent
        parts = mesh.model * (mesh.sequence if config.num_heads % (mesh.model * mesh.sequence) == 0 else 1)
        heads = max(config.num_heads // parts, 1)

        def visible(window: int | None) -> int:
            width = min(window or length, length)
            return length * width - width * (width - 1) // 2

        largest = max(visible(block.window) for block in self.child.blocks)
        return rows // mesh.data * heads * largest * (FLOAT32 + WIDTH)

    def _blocks(self, kernel: str) -> tuple[int, int]:
        """The number of blocks of rows for all token-expert pairs of a layer, and the rows of a block."""
        pairs = self.tokens * self.parent.experts_per_token
        block = BLOCK_ROWS[kernel](pairs, self.held_experts, self.packed)
        return num_blocks(pairs, self.held_experts, block), block

    def estimated(self, usage: Usage, other: PlannedTraining[Any]) -> Usage:
        """Estimates what a step of another run needs from what this one's does.

        Temporaries are those by arithmetic plus what compiling found beyond them, scaled as the parts that grow with
        tokens. For gpt-oss-120b that was within about a tenth of what compiling found, down to an eighth of the tokens.

        Raises ConfigError for a model axis of another size that does not divide the experts.
        """
        mesh, others_mesh = self.recipe.mesh, other.recipe.mesh
        undivided = any(block.num_experts % others_mesh.model for block in self.parent.blocks)
        if others_mesh.model != mesh.model and undivided:
            raise ConfigError(f"mesh.model is {others_mesh.model}, which does not divide the experts")
        devices, model = mesh.devices / others_mesh.devices, mesh.model / others_mesh.model
        scales = {
            "experts": model,
            "base": model,
            "master_weights": devices,
            "optimizer": devices,
            "batch": math.prod(other.rows) / math.prod(self.rows) * devices * (others_mesh.model / mesh.model),
        }
        held = {name: math.ceil(usage.held[name] * scale) for name, scale in scales.items()}
        parts, others = self.temporaries(usage.held["master_weights"]), other.temporaries(held["master_weights"])
        beyond = usage.temporaries - sum(parts.values())
        temporaries = sum(others.values()) + math.ceil(beyond * _of_tokens(others) / _of_tokens(parts))
        return Usage(held | {"decoded": other.decoded}, temporaries)


def _of_tokens(parts: dict[str, int]) -> int:
    """Bytes of the parts that grow with tokens."""
    return sum(size for name, size in parts.items() if name not in (_SUMS, _STUDENT, _HEADS))
