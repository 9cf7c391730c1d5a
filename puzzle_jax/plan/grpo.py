"""The memory that reinforcement learning needs on every device, found without weights and without accelerators.

The method and its limits are those of `plan.distill`.

A step has phases, each of which holds other arrays beside the policy, its master weights and the optimizer's state:

    rollout   a second copy of the policy's weights, unstacked by layer, all slots with their caches, and the rows that
              are prefilled, while slots decode
    score     a micro-batch, where old or reference log-probabilities are needed
    update    a micro-batch, and the sums of gradients that its gradients are added to
    apply     the sums of gradients, while the next policy is computed from them

All programs are compiled: those of generation, scoring, accumulating and applying. Arrays that XLA copies instead of
updating them in place, as decoding may do with caches, count as temporaries.

Left out: micro-batches that the host places ahead; what grows with master weights of experts, which are assumed to be
frozen; and all that `plan.distill` leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from puzzle_jax.files import Json
from puzzle_jax.generate.engine import chunk_tokens, group_rows, own_context, slot_context
from puzzle_jax.generate.slots import expert_id_dtype
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.sharding import generation_mesh, rows_sharding
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.plan import abstract
from puzzle_jax.plan.abstract import FLOAT32, bytes_beside, device_bytes, kernel_shapes
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.engine import AbstractEngine
from puzzle_jax.plan.record import GB, Change, Usage, least_changes, scaled
from puzzle_jax.plan.training import Extra, PlannedTraining
from puzzle_jax.train.grpo.policy import Policy
from puzzle_jax.train.grpo.policy_update import PolicyUpdate
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.rows import Packed

ROLLOUT, SCORE, UPDATE, APPLY = PHASES = ("rollout", "score", "update", "apply")

INT32 = 4
"""Bytes of a token."""


class StepNeeds(NamedTuple):
    """The most that one step may need.

    Attributes:
      answers: answers that are sampled, including those that replace prompts without signal.
      tokens: tokens of all these answers.
      rows, micro_batches: those of all updates together, if no two answers fit into a row.
      expert_bytes: bytes of the ids of the experts that answers were routed to, which the host holds; up to three
        times as many while rows are packed.
    """

    answers: int
    tokens: int
    rows: int
    micro_batches: int
    expert_bytes: int


@dataclass(frozen=True)
class PlannedPolicy(PlannedTraining[GrpoRecipe]):
    """A run of reinforcement learning, as far as memory depends on it; its child is the policy itself.

    Raises ConfigError for rows beyond the model's context, experts that are to be trained, or cannot be packed.
    """

    def __post_init__(self) -> None:
        self.recipe.check_context(self.parent.max_position)
        super().__post_init__()

    @property
    def rows(self) -> tuple[int, int, int]:
        """The largest micro-batch."""
        if self.recipe.update.share_prompts:
            largest = max(self.recipe.shared_shapes, key=lambda shape: shape.rows * shape.length)
            return 1, largest.rows, largest.length
        return 1, self.recipe.update.rows, self.recipe.update.row_length

    @property
    def losses(self) -> Iterable[str]:
        return ("next_token",)  # which needs as much as a policy's loss

    @cached_property
    def update(self) -> PolicyUpdate:
        """The programs that update the policy."""
        update = self.recipe.update
        settings, strip = self.recipe.loss.resolved, self.recipe.strip
        policy = Policy(self.student, settings, update.token_chunk, update.vocab_chunk, strip)
        return PolicyUpdate(policy, self.optimizer, self.state[1], self.mesh)

    @property
    def scores(self) -> dict[str, bool]:
        """Returns whether log-probabilities are needed before an update: old ones, and the reference's."""
        update = self.recipe.update
        return {"old": update.updates > 1, "reference": bool(self.recipe.loss.resolved.kl) or update.reference}

    def batch(self, *, scored: bool) -> Packed:
        """A micro-batch as `policy_batches` packs it, without values; `scored` adds what an update reads."""
        config = self.parent
        extras: dict[str, Extra] = dict.fromkeys(("advantages", "coefficients", "sampler", "shares"), (jnp.float32,))
        if self.recipe.rollout.replay:
            extras["experts"] = (expert_id_dtype(config), config.num_layers, config.experts_per_token)
        if scored:
            extras |= {name: (jnp.float32,) for name, needed in self.scores.items() if needed}
        return self.abstract_rows(self.rows[1:], None if self.mesh is None else rows_sharding(self.mesh), extras)

    # The sampler ------------------------------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Positions of a slot for the longest prompt and answer."""
        return slot_context(own_context(self.recipe.update.row_length, self.parent))

    @property
    def row_parts(self) -> int:
        """Parts of the mesh that slots are split over."""
        return self.recipe.mesh.data * self.recipe.mesh.sequence

    @property
    def group_rows(self) -> int:
        """Rows that are prefilled together."""
        return group_rows(chunk_tokens(self.context), self.recipe.rollout.slots, self.row_parts)

    @property
    def cache(self) -> CacheFormat:
        return CacheFormat(self.recipe.rollout.cache)

    @cached_property
    def engine(self) -> AbstractEngine:
        """The engine that samples answers."""
        slots, replay = self.recipe.rollout.slots, self.recipe.rollout.replay
        mesh = self.mesh and generation_mesh(self.mesh)
        return AbstractEngine(self.parent, slots, self.context, self.cache, mesh, log_probs=True, experts=replay)

    @property
    def sampler_params(self) -> Params:
        """The policy's weights as `rollouts.Sampler` unstacks them, without values."""

        def unstacked(base: Params, trained: Params) -> Params:
            return unstack_params(self.student.params(base, trained), self.student.runs)

        mesh = self.mesh and generation_mesh(self.mesh)
        return abstract.layer_params(self.parent, mesh, unstacked, self.fixed.base, self.state[0].params)

    @property
    def slot_cache_bytes(self) -> int:
        """Bytes of one slot's caches, on all devices together."""
        return self.cache.cache_bytes(self.parent, self.context, compiler().dtype)

    def caches_on_device(self, rows: int) -> int:
        """Bytes on one device of the caches of `rows` rows, without scales: rows are split over "data" and "sequence",
        heads over "model", where these divide them."""
        model, heads = self.recipe.mesh.model, self.parent.num_kv_heads
        return self._rows_on_device(rows) * self.slot_cache_bytes // (model if heads % model == 0 else 1)

    @property
    def slots_on_device(self) -> int:
        """Bytes that slots hold on one device besides caches, without counters."""
        by_position = INT32 + FLOAT32 + self._expert_bytes
        slots = self._rows_on_device(self.recipe.rollout.slots)
        return slots * (self.parent.vocab_size * FLOAT32 + self.context * by_position)

    def _rows_on_device(self, rows: int) -> int:
        return rows // self.row_parts if rows % self.row_parts == 0 else rows

    @property
    def _expert_bytes(self) -> int:
        """Bytes of the ids of the experts that one token was routed to, where they are replayed; 0 elsewhere."""
        if not self.recipe.rollout.replay:
            return 0
        return self.parent.num_layers * self.parent.experts_per_token * expert_id_dtype(self.parent).itemsize

    @property
    def needs(self) -> StepNeeds:
        """The needs of a step in which all answers reach their limit and all carry a signal."""
        prompts, rollout, update = self.recipe.prompts, self.recipe.rollout, self.recipe.update
        learnt = prompts.prompts * rollout.group
        answers = learnt * (1 + rollout.resample)
        groups = [len(range(part, prompts.prompts, update.updates)) for part in range(update.updates)]
        return StepNeeds(
            answers=answers,
            tokens=answers * max(map(rollout.limit, prompts.efforts)),
            rows=learnt,
            micro_batches=sum(math.ceil(count * rollout.group / update.rows) for count in groups),
            expert_bytes=answers * update.row_length * self._expert_bytes,
        )

    # What a plan is made of -------------------------------------------------------------------------------------------

    @property
    def about(self) -> list[str]:
        prompts, rollout = self.recipe.prompts, self.recipe.rollout
        answers = ", ".join(f"{rollout.limit(effort):,} at {effort} effort" for effort in prompts.efforts)
        return [
            f"{self.recipe.model.name} on {self.on_devices}",
            f"{prompts.prompts} prompts x {rollout.group} answers a step, tokens up to {answers}",
        ]

    @property
    def programs(self) -> dict[str, Callable[[], Usage]]:
        score = {SCORE: self._score} if any(self.scores.values()) else {}
        return {ROLLOUT: self._rollout, **score, UPDATE: self._accumulate, APPLY: self._apply}

    def _rollout(self) -> Usage:
        params = self.sampler_params
        usage = self.engine.usage(params)
        return self._usage(usage.temporaries, copy=device_bytes(params), **usage.held, decoded=self.decoded)

    def _score(self) -> Usage:
        batch = self.batch(scored=False)
        with kernel_shapes():
            lowered = self.update.lowered_score(self.state[0].params, self.fixed, batch, **self.scores)
        return self._usage(bytes_beside(lowered), batch=device_bytes(batch), decoded=self.decoded)

    def _accumulate(self) -> Usage:
        sums, accumulate, _ = self._learning
        batch = device_bytes(self.batch(scored=True))
        return self._usage(bytes_beside(accumulate), batch=batch, sums=device_bytes(sums), decoded=self.decoded)

    def _apply(self) -> Usage:
        sums, _, apply = self._learning
        return self._usage(bytes_beside(apply), sums=device_bytes(sums))

    @cached_property
    def _learning(self) -> tuple[PyTree, jax.stages.Lowered, jax.stages.Lowered]:
        with kernel_shapes():
            return self.update.lowered(self.state[0], self.fixed, self.batch(scored=True))

    def _usage(self, temporaries: int, **held: int) -> Usage:
        return Usage({**self.always_held, **held}, temporaries)

    @property
    def labels(self) -> dict[str, str]:
        return {
            **super().labels,
            "copy": "weights unstacked for the sampler",
            **self.engine.labels,
            "batch": "micro-batch",
            "sums": "sums of gradients, float32",
        }

    def changes(self, found: Mapping[str, Usage], program: str, limit: int) -> list[Change]:
        """Changes that would make a phase fit."""
        (_, rows, _), slots = self.rows, self.recipe.rollout.slots
        parts, data = self.row_parts, self.recipe.mesh.data
        ways = {
            "fewer slots": ({"rollout.slots": fewer} for fewer in range((slots - 1) // parts * parts, 0, -parts)),
            "smaller micro-batches, more of them": ({"update.rows": fewer} for fewer in range(rows - data, 0, -data)),
            "shorter rows and answers": self._shorter(),
            **self.device_ways("update.rows"),
        }

        def total(recipe: GrpoRecipe) -> int:
            return self.estimated_phases(found, replace(self, recipe=recipe))[program].total

        return least_changes(self.recipe, ways, total, limit)

    def _shorter(self) -> Iterator[dict[str, Json]]:
        """Rows of half the length, a quarter and so on, with the limits of all answers cut alike."""
        rollout, length = self.recipe.rollout, self.recipe.update.row_length
        for shorter in scaled(self.recipe, ("update.row_length",)):
            factor = length // shorter["update.row_length"]
            limits = {effort: max(rollout.limit(effort) // factor, 1) for effort in self.recipe.prompts.efforts}
            yield {"rollout.max_tokens": limits, **shorter}

    def estimated_phases(self, found: Mapping[str, Usage], other: PlannedPolicy) -> dict[str, Usage]:
        """Estimates what another run needs in its phases from what this one does."""
        one = found[UPDATE]
        update = self.estimated(replace(one, temporaries=one.held["sums"] + one.temporaries), other)
        devices = self.recipe.mesh.devices / other.recipe.mesh.devices
        caches = other.caches_on_device(other.recipe.rollout.slots) / self.caches_on_device(self.recipe.rollout.slots)
        passes = max(update.temporaries - math.ceil(one.held["sums"] * devices), 0) / one.temporaries
        temporaries = {ROLLOUT: caches, SCORE: passes, UPDATE: passes, APPLY: devices}
        scales = {
            "copy": self.recipe.mesh.model / other.recipe.mesh.model,
            "caches": caches,
            "slots": other.slots_on_device / self.slots_on_device,
            "group": other.caches_on_device(other.group_rows) / self.caches_on_device(self.group_rows),
            "sums": devices,
        }

        def size(name: str, before: int) -> int:
            return math.ceil(before * scales[name]) if name in scales else update.held[name]

        return {
            phase: Usage(
                {name: size(name, before) for name, before in usage.held.items()},
                math.ceil(usage.temporaries * temporaries[phase]),
            )
            for phase, usage in found.items()
        }

    @property
    def notes(self) -> list[str]:
        needs, recipe, mesh, heads = self.needs, self.recipe, self.recipe.mesh, self.parent.num_kv_heads
        lines = [
            f"a step at most: {needs.answers:,} answers of {needs.tokens / 1e6:,.1f} million tokens, "
            f"{needs.rows:,} rows of {recipe.update.row_length:,}, {needs.micro_batches:,} micro-batches",
            f"a slot: {self.context:,} positions, {self.slot_cache_bytes / GB:.2f} GB of caches on all devices",
        ]
        if needs.expert_bytes:
            size, packing = f"{needs.expert_bytes / GB:,.1f} GB", f"{3 * needs.expert_bytes / GB:,.1f} GB"
            lines.append(f"on the host: experts of all answers, {size} at most, and {packing} while rows are packed")
        lines.append(compiler().about)
        if not any(self.scores.values()):
            lines.append("nothing is scored: one update per step, and no reference")
        if recipe.rollout.slots % self.row_parts:
            lines.append(f"every part of the mesh holds all slots: {mesh.data} x {mesh.sequence} do not divide them")
        if heads % mesh.model:
            lines.append(f"every model device holds all of a cache: {mesh.model} do not divide {heads} key-value heads")
        return [*lines, *super().notes]
