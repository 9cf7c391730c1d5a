"""`python -m puzzle_jax.train plan`: what a distillation needs on every device, before there are devices.

Of parent and child config.json is read and nothing else. The compiler is XLA's for CPUs, on virtual devices; see
`plan.distill` for what its figures are worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.plan.distill import DeviceMemory, PlannedJob, plan
from puzzle_jax.plan.distill_arithmetic import by_arithmetic, changes, gathered_on_cpus
from puzzle_jax.plan.programs import GB, device_limit, read_model, virtual_devices
from puzzle_jax.train.distill.objectives import DISTRIBUTION, HIDDEN, LossSettings
from puzzle_jax.train.distill.recipe import MeshSettings
from puzzle_jax.train.optimizer import OPTIMIZERS, OptimizerSettings

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "experts_per_token",
    "num_layers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""

    def add(flag: str, *, help: str, **options: Any) -> None:
        shown = " (default: %(default)s)" if "default" in options else ""
        parser.add_argument(flag, help=help + shown, **options)

    add("--parent", type=Path, required=True, metavar="CONFIG|DIR", help="config.json, or a directory that has one")
    add("--child", type=Path, required=True, metavar="CONFIG|DIR", help="likewise")
    add("--mesh", required=True, metavar="DATA,SEQUENCE,MODEL", help="devices that share rows, positions, experts")
    add("--row-length", type=int, default=4096, metavar="N", help="positions of a row")
    add("--rows", type=int, default=8, metavar="N", help="of a micro-batch, on all devices together")
    add("--micro-batches", type=int, default=1, metavar="N", help="of a step")
    add("--hbm-gb", type=float, default=80.0, metavar="GB", help="memory of a device, in 10^9 bytes")
    parser.add_argument(
        "--loss", nargs="+", metavar="TERM=SHARE", help="as in recipes (default: forward_kl=1, or top_k_kl=1)"
    )
    parser.add_argument("--teacher-cache", action="store_true", help="the teacher was asked before")
    add("--top-k", type=int, default=64, metavar="N", help="tokens per position of the teacher's cache")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="whose state there is")


def run(options: argparse.Namespace, console: Console) -> None:
    """Reads, compiles, prints.

    Raises PuzzleError for whatever cannot be used, before anything is compiled.
    """
    limit = device_limit(options)
    job = _job(options)
    virtual_devices(job.mesh.devices)
    console.print(f"compiling for {job.mesh.devices} virtual devices", highlight=False)
    memory = plan(job)
    out = plain_console()
    mesh = job.mesh
    out.print(
        f"{options.parent.name} -> {options.child.name} on {mesh.data} x {mesh.sequence} x {mesh.model} devices, "
        f"{job.micro_batches} x {job.rows} rows of {job.row_length:,} tokens a step",
        highlight=False,
        soft_wrap=True,
    )
    out.print(_table(job, memory, limit))
    for line in (*_verdict(job, memory, limit), *_notes(job)):
        out.print(line, highlight=False, soft_wrap=True)


# Input ----------------------------------------------------------------------------------------------------------------


def _job(options: argparse.Namespace) -> PlannedJob:
    parent, packed = read_model(options.parent)
    child, _ = read_model(options.child)
    mesh = _mesh(options.mesh)
    loss = _loss(options.loss, options.teacher_cache)
    return PlannedJob(
        child=_view(parent, child, options.parent, options.child),
        packed=packed,
        mesh=mesh,
        row_length=options.row_length,
        rows=options.rows,
        micro_batches=options.micro_batches,
        loss=loss,
        top_k=options.top_k if options.teacher_cache else None,
        optimizer=OptimizerSettings(name=options.optimizer),
    )


def _view(parent: ModelConfig, child: ModelConfig, parent_path: Path, child_path: Path) -> Child:
    """The child as a view that keeps the first of its parent's experts."""
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


def _mesh(text: str) -> MeshSettings:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f"--mesh is {text!r}, but must be three numbers of devices, DATA,SEQUENCE,MODEL")
    data, sequence, model = map(int, parts)
    return MeshSettings(data=data, sequence=sequence, model=model)


def _loss(terms: Sequence[str] | None, cached: bool) -> LossSettings:
    known = (*DISTRIBUTION, *HIDDEN)
    shares: dict[str, Any] = dict.fromkeys(known, 0.0)
    for term in terms or [f"{'top_k' if cached else 'forward'}_kl=1"]:
        name, _, share = term.partition("=")
        if name not in known:
            raise ConfigError(f"--loss has {term!r}, but must be TERM=SHARE with a term of {', '.join(known)}")
        try:
            shares[name] = float(share)
        except ValueError:
            raise ConfigError(f"--loss has {term!r}, but a share must be a number") from None
    return LossSettings(**shares)


# Output ---------------------------------------------------------------------------------------------------------------


def _table(job: PlannedJob, memory: DeviceMemory, limit: float) -> Table:
    table = Table("GB per device", "compiled", "arithmetic")
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, compiled: int | None, arithmetic: int | None) -> None:
        shown = ("" if size is None else f"{size / GB:,.3f}" for size in (compiled, arithmetic))
        table.add_row(name, *shown)

    parts = by_arithmetic(job, memory)
    form = "MXFP4" if job.packed else "bfloat16"
    add(f"resident parent, experts, {form}", memory.experts, memory.experts)
    add("resident parent, all else, bfloat16", memory.resident, memory.resident)
    add("masters, float32", memory.masters, memory.masters)
    add(f"optimiser state, {job.optimizer.name}", memory.optimizer, memory.optimizer)
    add("batch", memory.batch, memory.batch)
    table.add_section()
    add("temporaries", memory.temporaries, sum(parts.values()))
    for name, size in parts.items():
        add(f"  {name}", None, size)
    if memory.decoded:
        add("one layer's experts, decoded", memory.decoded, memory.decoded)
    table.add_section()
    add("total", memory.total, _lower(job, memory))
    add("of a device's", round(limit), round(limit))
    return table


def _lower(job: PlannedJob, memory: DeviceMemory) -> int:
    """The total with temporaries by arithmetic."""
    return replace(memory, temporaries=sum(by_arithmetic(job, memory).values())).total


def _verdict(job: PlannedJob, memory: DeviceMemory, limit: float) -> list[str]:
    """Whether it fits, and if not, what would."""
    lower = _lower(job, memory)
    if memory.total <= limit:
        return [f"fits: {(limit - memory.total) / GB:.1f} GB are left"]
    first = (
        f"may fit: {(memory.total - limit) / GB:.1f} GB too many as compiled here, but not by arithmetic"
        if lower <= limit
        else f"does not fit: {(memory.total - limit) / GB:.1f} GB too many"
    )
    lines = [f"{first}; each of these alone should do (about, plan it to know):"]
    found = changes(job, memory, int(limit))
    for change in found:
        other = change.job
        lines.append(
            f"  {change.what}: --mesh {other.mesh.data},{other.mesh.sequence},{other.mesh.model} --rows {other.rows} "
            f"--row-length {other.row_length} --micro-batches {other.micro_batches}: {change.total / GB:.1f} GB"
        )
    if not found:
        lines[0] = first
        lines.append(
            f"  no one change is enough: {memory.arguments / GB:.1f} GB are there before a step begins; more devices "
            "hold less of masters and optimiser state each, and on the model axis fewer experts"
        )
    lines.append(_of_teacher_cache(job))
    return lines


def _of_teacher_cache(job: PlannedJob) -> str:
    if not job.asks_teacher:
        return "  the teacher is not asked; its experts stay, since they are the student's, too"
    if any(getattr(job.loss, name) for name in HIDDEN):
        return "  a teacher's cache has no hidden states, so these losses need the teacher itself"
    saved = 2 * job.parent.vocab_size * job.parent.hidden_size / GB
    return f"  a teacher's cache would save its pass, but only its head of memory, up to {saved:.1f} GB"


def _notes(job: PlannedJob) -> list[str]:
    """What the figures are."""
    lines = [
        "compiled: by XLA for CPUs, in float16 for bfloat16; arithmetic: large parts alone, one layer at a time",
        f"left out: {gathered_on_cpus(job) / GB:.1f} GB of matrices that a CPU alone would gather for blocks of rows",
    ]
    undivided = [block.num_experts for block in job.parent.blocks if block.num_experts % job.mesh.model]
    if undivided:
        lines.append(f"experts are whole on every device: {job.mesh.model} devices do not divide {undivided[0]}")
    return lines
