"""What a distillation needs by arithmetic, and what would make one fit that does not; see `plan.distill`.

Nothing is compiled here: figures follow from a job and from what was found for it or for another one.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.grouped_matmul.layout import num_blocks
from puzzle_jax.plan.distill import DeviceMemory, PlannedJob, expert_numbers
from puzzle_jax.plan.programs import FLOAT32, WIDTH
from puzzle_jax.train.distill.objectives import FROM_TEACHER, HIDDEN

_SUMS = "sums of gradients, float32"
_STUDENT = "student and gradients of a micro-batch, bfloat16"
_HEADS = "output heads and a gradient, whole"


def by_arithmetic(job: PlannedJob, memory: DeviceMemory) -> dict[str, int]:
    """The large parts of a step's temporaries on one device, in bytes, where one layer at a time is computed again.

    Heads are whole on every device, because a loss walks through their columns in slices. A layer's experts may get all
    pairs of the tokens that are there, and attention keeps the weights of whole rows.
    """
    config, tokens = job.parent, job.tokens
    hidden, inter = config.hidden_size, config.intermediate_size
    states = config.num_layers * tokens * hidden * WIDTH
    heads = 2 if any(name in FROM_TEACHER for name in job.loss.shares) else 1
    learning = memory.masters * job.mesh.devices // FLOAT32  # numbers, all devices together
    # By padded row: the row, gate and linear part, activation, and outputs by expert and by token.
    of_experts = hidden * (WIDTH + 2 * FLOAT32) + inter * (2 * FLOAT32 + WIDTH)
    parts = {
        _SUMS: memory.masters,
        _STUDENT: 2 * learning * WIDTH // job.mesh.model,
        _HEADS: config.vocab_size * hidden * (heads * WIDTH + FLOAT32),
        "input of every layer": states,
        "hidden states of both models": 2 * states if any(name in HIDDEN for name in job.loss.shares) else 0,
        "attention of one layer": _attention(job),
        "experts of one layer": _padded_rows(job) * of_experts,
    }
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
    return job.rows // mesh.data * heads * largest * (FLOAT32 + WIDTH)


def _padded_rows(job: PlannedJob) -> int:
    block = BLOCK_ROWS["ragged_dot"](job.pairs, job.held_experts, job.packed)
    return num_blocks(job.pairs, job.held_experts, block) * block


def gathered_on_cpus(job: PlannedJob) -> int:
    """Bytes of experts' matrices beside their blocks of rows, which the way for CPUs has, and which are left out."""
    block = BLOCK_ROWS["blocked"](job.pairs, job.held_experts, job.packed)
    return num_blocks(job.pairs, job.held_experts, block) * expert_numbers(job.parent) * WIDTH


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
    for what, names in (
        ("smaller micro-batches, more of them", ("rows", "micro_batches")),
        ("shorter rows", ("row_length",)),
        ("more devices, each with fewer rows", ("mesh.data",)),
        ("more devices, each with a part of every row", ("mesh.sequence",)),
        ("more devices, each with fewer experts and heads", ("mesh.model",)),
    ):
        for factor in (2**power for power in range(1, 11)):
            try:
                other = _scaled(job, names, factor)
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

    Temporaries are those by arithmetic and what there was beyond them, which goes with the parts that tokens make. For
    gpt-oss-120b that was within about a tenth of what compiling found, down to an eighth of the tokens.
    """
    devices = job.mesh.devices / other.mesh.devices
    model = job.mesh.model / other.mesh.model
    rows = other.rows * other.row_length * other.micro_batches / (job.rows * job.row_length * job.micro_batches)
    masters = math.ceil(memory.masters * devices)
    parts, others = by_arithmetic(job, memory), by_arithmetic(other, replace(memory, masters=masters))
    beyond = memory.temporaries - sum(parts.values())
    return DeviceMemory(
        experts=math.ceil(memory.experts * model),
        resident=math.ceil(memory.resident * model),
        masters=masters,
        optimizer=math.ceil(memory.optimizer * devices),
        batch=math.ceil(memory.batch * rows * devices * (other.mesh.model / job.mesh.model)),
        temporaries=sum(others.values()) + math.ceil(beyond * _of_tokens(others) / _of_tokens(parts)),
        decoded=other.decoded,
    )


def _of_tokens(parts: dict[str, int]) -> int:
    """Of the parts that grow with tokens."""
    return sum(size for name, size in parts.items() if name not in (_SUMS, _STUDENT, _HEADS))
