"""What reinforcement learning needs on every device, found without weights and without accelerators.

The ways and limits are those of `plan.distill`.

A step has phases, and each holds other arrays beside the policy, its masters and the optimiser's state:

    rollout   the policy's weights once more, laid apart by layer, all slots with their caches, and the rows whose
              prompts are run; while slots decode
    score     a micro-batch; where old or reference log-probabilities are needed
    update    a micro-batch and sums of gradients; while they are added to
    apply     sums of gradients; while they become the next policy

All programs are compiled: the one that lays weights apart, decoding, scoring, accumulating and applying. What XLA lays
elsewhere than where it found it, as decoding may do with caches, is among temporaries.

Left out: prefill, whose chunks have fewer tokens than steps of many slots, and admission; micro-batches that the host
places ahead; what grows with masters of experts, which are taken to be frozen; and all that `plan.distill` leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.abstract import AbstractEngine, without_values
from puzzle_jax.generate.engine import chunk_tokens, group_rows, own_context, slot_context
from puzzle_jax.generate.slots import expert_id_dtype
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.child import whole
from puzzle_jax.model.sharding import generation_mesh, make_training_mesh, params_sharding, rows_sharding
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.plan.distill import (
    STEPS,
    Extra,
    abstract_resident,
    abstract_rows,
    abstract_train_state,
    decoded_bytes,
    resident_bytes,
)
from puzzle_jax.plan.programs import bytes_beside, check_packed, device_bytes, in_place, kernel_shapes
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo.policy import Policy
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.optimizer import make_optimizer
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import TrainState
from puzzle_jax.train.student import Student

ROLLOUT, SCORE, UPDATE, APPLY = PHASES = ("rollout", "score", "update", "apply")


@dataclass(frozen=True)
class PlannedPolicy:
    """A run of reinforcement learning, as far as memory depends on it.

    Attributes:
      config: of the policy.
      recipe: its settings; files that it names are not read.
      packed: whether the policy's checkpoint has packed experts; they stay so unless the recipe wants them dense.

    Raises ConfigError for rows beyond the model's context, experts that cannot be packed, and freed experts.
    """

    config: ModelConfig
    recipe: GrpoRecipe
    packed: bool = True

    def __post_init__(self) -> None:
        if self.recipe.packed is False:
            object.__setattr__(self, "packed", False)
        length = self.recipe.update.row_length
        if length > self.config.max_position:
            raise ConfigError(f"update.row_length is {length}, but the model's context is {self.config.max_position}")
        if self.packed:
            check_packed(self.config)
        if "experts" in self.recipe.train:
            raise ConfigError("train has 'experts', but a plan is for experts that are frozen")

    @cached_property
    def student(self) -> Student:
        return Student(whole(self.config), self.recipe.train, self.recipe.remat)

    @property
    def context(self) -> int:
        """Positions of a slot for the longest prompt and answer."""
        return slot_context(own_context(self.recipe.update.row_length, self.config))

    def engine(self, mesh: Mesh | None) -> AbstractEngine:
        """The sampler, on a mesh of training."""
        rollout = self.recipe.rollout
        return AbstractEngine(
            self.config,
            rollout.slots,
            self.context,
            self.cache,
            mesh and generation_mesh(mesh),
            log_probs=True,
            experts=rollout.replay,
        )

    @property
    def group_rows(self) -> int:
        """Rows whose prompts are run together."""
        return group_rows(chunk_tokens(self.context), self.recipe.rollout.slots, self.row_parts)

    @property
    def row_parts(self) -> int:
        """Parts of the mesh that slots are dealt to."""
        return self.recipe.mesh.data * self.recipe.mesh.sequence

    @property
    def cache(self) -> CacheFormat:
        return CacheFormat(self.recipe.rollout.cache)

    @property
    def scores(self) -> dict[str, bool]:
        """Whether log-probabilities are needed before an update: old ones, and the reference's."""
        update = self.recipe.update
        return {"old": update.updates > 1, "reference": bool(self.recipe.loss.resolved.kl) or update.reference}

    def make_mesh(self) -> Mesh | None:
        """Raises ConfigError where JAX has fewer devices."""
        mesh = self.recipe.mesh
        return make_training_mesh(mesh.data, mesh.sequence, mesh.model) if mesh.devices > 1 else None


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on one device in a phase; 0 for what it does not hold.

    Attributes:
      experts, resident: of the policy that training began with, the matrices of its experts and all else.
      masters, optimizer: float32 masters of what learns, and the optimiser's state with all counters.
      copy: the policy's weights as the sampler reads them.
      caches: of all slots.
      slots: logits, tokens, log-probabilities, chosen experts and counters of all slots.
      group: rows whose prompts are run together, with caches of their own.
      batch: a micro-batch.
      sums: of gradients, over micro-batches.
      temporaries: what XLA allots beside.
      decoded: one layer's packed experts in bfloat16, as in `plan.DeviceMemory`.
    """

    experts: int = 0
    resident: int = 0
    masters: int = 0
    optimizer: int = 0
    copy: int = 0
    caches: int = 0
    slots: int = 0
    group: int = 0
    batch: int = 0
    sums: int = 0
    temporaries: int = 0
    decoded: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))


class Held(NamedTuple):
    """What is there in all phases, without values.

    Attributes:
      update: the programs that learn.
      state: masters and the optimiser's state.
      resident: the policy that training began with.
      memory: bytes of all that on a device.
    """

    update: PolicyUpdate
    state: TrainState
    resident: Params
    memory: PhaseMemory


def plan_policy(run: PlannedPolicy) -> dict[str, PhaseMemory]:
    """Compiles a step's programs for virtual devices; phases in order. Takes a minute for a model of 36 layers.

    Raises ConfigError where JAX has fewer devices than the mesh.
    """
    mesh = run.make_mesh()
    held = abstract_policy(run, mesh)
    found = {ROLLOUT: _rollout(run, held, mesh)}
    if any(run.scores.values()):
        found[SCORE] = _score(run, held, mesh)
    return found | _learning(run, held, mesh)


def abstract_policy(run: PlannedPolicy, mesh: Mesh | None) -> Held:
    """What is there in all phases."""
    student, recipe = run.student, run.recipe
    resident = abstract_resident(student, run.packed, mesh)
    optimizer = make_optimizer(recipe.optimizer, STEPS)
    state, shardings = abstract_train_state(student, resident, optimizer, mesh)
    policy = Policy(student, recipe.loss.resolved, recipe.update.token_chunk, recipe.update.vocab_chunk)
    experts, others = resident_bytes(resident)
    memory = PhaseMemory(
        experts=experts,
        resident=others,
        masters=device_bytes(state.params),
        optimizer=device_bytes(state._replace(params=None)),
    )
    return Held(PolicyUpdate(policy, optimizer, shardings, mesh), state, resident, memory)


def abstract_micro_batch(run: PlannedPolicy, mesh: Mesh | None, *, scored: bool) -> Packed:
    """A micro-batch as `policy_batches` packs it, in place; with the scores that an update reads, or before them."""
    update = run.recipe.update
    extras: dict[str, Extra] = {name: (jnp.float32,) for name in ("advantages", "coefficients", "sampler", "shares")}
    if run.recipe.rollout.replay:
        extras["experts"] = (expert_id_dtype(run.config), run.config.num_layers, run.config.experts_per_token)
    if scored:
        extras |= {name: (jnp.float32,) for name, needed in run.scores.items() if needed}
    sharding = None if mesh is None else rows_sharding(mesh)
    return abstract_rows((update.rows, update.row_length), sharding, extras)


# Phases ---------------------------------------------------------------------------------------------------------------


def _score(run: PlannedPolicy, held: Held, mesh: Mesh | None) -> PhaseMemory:
    batch = abstract_micro_batch(run, mesh, scored=False)
    with kernel_shapes():
        lowered = held.update.lowered_score(held.state.params, Fixed(held.resident), batch, **run.scores)
    return replace(held.memory, batch=device_bytes(batch), temporaries=bytes_beside(lowered), decoded=_decoded(run))


def _learning(run: PlannedPolicy, held: Held, mesh: Mesh | None) -> dict[str, PhaseMemory]:
    batch = abstract_micro_batch(run, mesh, scored=True)
    with kernel_shapes():
        sums, accumulate, apply = held.update.lowered(held.state, Fixed(held.resident), batch)
    memory = replace(held.memory, sums=device_bytes(sums))
    return {
        UPDATE: replace(memory, batch=device_bytes(batch), temporaries=bytes_beside(accumulate), decoded=_decoded(run)),
        APPLY: replace(memory, temporaries=bytes_beside(apply)),
    }


def _rollout(run: PlannedPolicy, held: Held, mesh: Mesh | None) -> PhaseMemory:
    params, engine = abstract_sampler(run, held, mesh), run.engine(mesh)
    state = engine.state()
    return replace(
        held.memory,
        copy=device_bytes(params),
        caches=device_bytes(state.caches),
        slots=device_bytes(state._replace(caches=[])),
        group=device_bytes(engine.group()),
        temporaries=max(map(bytes_beside, engine.lowered(params))),
        decoded=_decoded(run),
    )


def abstract_sampler(run: PlannedPolicy, held: Held, mesh: Mesh | None) -> Params:
    """The policy's weights as `rollouts.Sampler` lays them apart, in place; packed experts as `StackedMXFP4`, which
    takes what has no values."""
    student = run.student

    def apart(resident: Params, trained: Params) -> Params:
        params = unstack_params(student.params(resident, trained), student.runs)
        return jax.tree.map(without_values, params, is_leaf=lambda node: isinstance(node, MXFP4))

    shapes = jax.eval_shape(apart, held.resident, held.state.params)
    if mesh is None:
        return shapes
    where = params_sharding(run.config, generation_mesh(mesh))
    return jax.tree.map(lambda sharding, part: in_place(part, jax.tree.map(lambda _: sharding, part)), where, shapes)


def _decoded(run: PlannedPolicy) -> int:
    return decoded_bytes(run.config, run.recipe.mesh) if run.packed else 0
