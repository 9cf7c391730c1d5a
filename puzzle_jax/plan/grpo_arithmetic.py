"""What a step of reinforcement learning asks for at most, and what would make one fit that does not; see
`plan.grpo`.

Nothing is compiled here: figures follow from a run and from what was found for it or for another one. An update needs
about what a distillation by the loss of the next token does, and `plan.distill_arithmetic` estimates both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from puzzle_jax.config import cache_bytes
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.slots import expert_id_dtype
from puzzle_jax.plan import distill_arithmetic as plan_arithmetic
from puzzle_jax.plan.distill import DeviceMemory, PlannedJob
from puzzle_jax.plan.grpo import APPLY, ROLLOUT, SCORE, UPDATE, PhaseMemory, PlannedPolicy
from puzzle_jax.plan.programs import DTYPE, FLOAT32
from puzzle_jax.train.distill.objectives import LossSettings

INT32 = 4
"""Bytes of a token."""


class StepNeeds(NamedTuple):
    """What one step has at most.

    Attributes:
      answers: that are sampled, with those in the place of prompts without signal.
      tokens: of all these answers.
      rows, micro_batches: of all updates together, if no two answers fit into a row.
      expert_bytes: of the experts that answers went through, which the host holds; up to three times as many while
        rows are packed.
    """

    answers: int
    tokens: int
    rows: int
    micro_batches: int
    expert_bytes: int


def step_needs(run: PlannedPolicy) -> StepNeeds:
    """Of answers that all reach their limit and all teach something."""
    recipe = run.recipe
    learnt = recipe.prompts.prompts * recipe.rollout.group
    answers = learnt * (1 + recipe.rollout.resample)
    longest = max(recipe.rollout.limit(effort) for effort in recipe.prompts.efforts)
    parts = [len(range(part, recipe.prompts.prompts, recipe.update.updates)) for part in range(recipe.update.updates)]
    return StepNeeds(
        answers=answers,
        tokens=answers * longest,
        rows=learnt,
        micro_batches=sum(math.ceil(groups * recipe.rollout.group / recipe.update.rows) for groups in parts),
        expert_bytes=answers * recipe.update.row_length * _expert_bytes(run),
    )


def slot_cache_bytes(run: PlannedPolicy) -> int:
    """Of one slot, on all devices together."""
    return cache_bytes(run.config, run.context, run.cache.stored_dtype(DTYPE).itemsize)


def caches_on_device(run: PlannedPolicy, rows: int) -> int:
    """Of so many rows, but for scales: rows over "data" and "sequence", heads over "model", where these divide
    them."""
    model, heads = run.recipe.mesh.model, run.config.num_kv_heads
    return _rows_on_device(run, rows) * slot_cache_bytes(run) // (model if heads % model == 0 else 1)


def slots_on_device(run: PlannedPolicy) -> int:
    """What slots hold besides caches, but for counters."""
    by_position = INT32 + FLOAT32 + _expert_bytes(run)
    slots = _rows_on_device(run, run.recipe.rollout.slots)
    return slots * (run.config.vocab_size * FLOAT32 + run.context * by_position)


def _rows_on_device(run: PlannedPolicy, rows: int) -> int:
    parts = run.row_parts
    return rows // parts if rows % parts == 0 else rows


def _expert_bytes(run: PlannedPolicy) -> int:
    """Of the experts that one token went through, where they are replayed."""
    if not run.recipe.rollout.replay:
        return 0
    return run.config.num_layers * run.config.experts_per_token * expert_id_dtype(run.config).itemsize


# What would do --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A run one of whose phases would fit, and what that needs, about."""

    what: str
    run: PlannedPolicy
    total: int


def changes(run: PlannedPolicy, found: Mapping[str, PhaseMemory], phase: str, limit: int) -> list[Change]:
    """For each way to need less, the least change with which a phase should fit into `limit` bytes per device; ways
    that cannot do it alone are left out."""
    ways: dict[str, Callable[[PlannedPolicy], Iterator[PlannedPolicy]]] = {
        "fewer slots": _fewer_slots,
        "smaller micro-batches, more of them": _fewer_rows,
        "shorter rows and answers": _shorter,
        "more devices, each with fewer rows and slots": lambda run: _more_devices(run, "data"),
        "more devices, each with a part of every row and fewer slots": lambda run: _more_devices(run, "sequence"),
        "more devices, each with fewer experts and heads": lambda run: _more_devices(run, "model"),
    }
    changes = []
    for what, others in ways.items():
        for other in others(run):
            total = estimated(run, found, other)[phase].total
            if total <= limit:
                changes.append(Change(what, other, total))
                break
    return changes


def estimated(run: PlannedPolicy, found: Mapping[str, PhaseMemory], other: PlannedPolicy) -> dict[str, PhaseMemory]:
    """About what another run needs in its phases, by what this one does."""
    before, after = _job(run), _job(other)
    one = found[UPDATE]
    learnt = DeviceMemory(
        one.experts, one.resident, one.masters, one.optimizer, one.batch, one.sums + one.temporaries, one.decoded
    )
    update = plan_arithmetic.estimated(before, learnt, after)
    devices = run.recipe.mesh.devices / other.recipe.mesh.devices
    model = run.recipe.mesh.model / other.recipe.mesh.model
    sums = math.ceil(one.sums * devices)
    passes = max(update.temporaries - sums, 0) / one.temporaries
    caches = caches_on_device(other, other.recipe.rollout.slots) / caches_on_device(run, run.recipe.rollout.slots)
    group = caches_on_device(other, other.group_rows) / caches_on_device(run, run.group_rows)
    temporaries = {ROLLOUT: caches, SCORE: passes, UPDATE: passes, APPLY: devices}

    def of(phase: str, memory: PhaseMemory) -> PhaseMemory:
        return PhaseMemory(
            experts=update.experts,
            resident=update.resident,
            masters=update.masters,
            optimizer=update.optimizer,
            copy=math.ceil(memory.copy * model),
            caches=math.ceil(memory.caches * caches),
            slots=math.ceil(memory.slots * slots_on_device(other) / slots_on_device(run)),
            group=math.ceil(memory.group * group),
            batch=update.batch if memory.batch else 0,
            sums=sums if memory.sums else 0,
            temporaries=math.ceil(memory.temporaries * temporaries[phase]),
            decoded=after.decoded if memory.decoded else 0,
        )

    return {phase: of(phase, memory) for phase, memory in found.items()}


def _job(run: PlannedPolicy) -> PlannedJob:
    """The distillation that an update is like."""
    recipe = run.recipe
    return PlannedJob(
        run.student.child,
        packed=run.packed,
        mesh=recipe.mesh,
        row_length=recipe.update.row_length,
        rows=recipe.update.rows,
        loss=LossSettings(forward_kl=0.0, next_token=1.0),
        optimizer=recipe.optimizer,
    )


def _with(run: PlannedPolicy, **sections: Mapping[str, Any]) -> PlannedPolicy:
    """With other fields in sections of the recipe."""
    recipe = run.recipe
    changed: dict[str, Any] = {name: replace(getattr(recipe, name), **values) for name, values in sections.items()}
    return replace(run, recipe=replace(recipe, **changed))


def _fewer_slots(run: PlannedPolicy) -> Iterator[PlannedPolicy]:
    """By as many as there are parts of the mesh that hold some."""
    parts = run.row_parts
    for slots in range((run.recipe.rollout.slots - 1) // parts * parts, 0, -parts):
        yield _with(run, rollout={"slots": slots})


def _fewer_rows(run: PlannedPolicy) -> Iterator[PlannedPolicy]:
    rows, data = run.recipe.update.rows, run.recipe.mesh.data
    for fewer in range(rows - data, 0, -data):
        yield _with(run, update={"rows": fewer})


def _shorter(run: PlannedPolicy) -> Iterator[PlannedPolicy]:
    """Half, a quarter, ... of a row, and as much less of every answer."""
    recipe = run.recipe
    for factor in _powers():
        if recipe.update.row_length % factor:
            return
        limits = {effort: max(recipe.rollout.limit(effort) // factor, 1) for effort in recipe.prompts.efforts}
        try:
            yield _with(run, update={"row_length": recipe.update.row_length // factor}, rollout={"max_tokens": limits})
        except ConfigError:
            return


def _more_devices(run: PlannedPolicy, axis: str) -> Iterator[PlannedPolicy]:
    """Twice, four times, ... as many on an axis; every device of the data axis keeps a row."""
    recipe = run.recipe
    for factor in _powers():
        size = getattr(recipe.mesh, axis) * factor
        if axis == "model" and any(block.num_experts % size for block in run.config.blocks):
            return
        rows = recipe.update.rows
        if axis == "data" and rows % size:
            rows = size
        try:
            yield _with(run, mesh={axis: size}, update={"rows": rows})
        except ConfigError:
            return


def _powers() -> Iterator[int]:
    return (2**power for power in range(1, 11))
