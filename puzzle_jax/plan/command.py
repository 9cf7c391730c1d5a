"""`puzzle plan search|distill|grpo`: what a run needs on every device, before there are devices.

A plan takes the settings of the run that it is for, and some of its own. It reads config.json of models, and
no traces or problems. `plan.compilers` says which compiler is used and what the figures are worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from puzzle_jax.commands import did_you_mean
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.hardware import HARDWARE, Hardware
from puzzle_jax.errors import ConfigError, check_range, shown
from puzzle_jax.files import Json
from puzzle_jax.model.child import identity_child
from puzzle_jax.numeric import Number
from puzzle_jax.plan.abstract import read_model, virtual_devices
from puzzle_jax.plan.compilers import compiler_named
from puzzle_jax.plan.distill import PlannedDistillation, first_experts
from puzzle_jax.plan.fitting import smallest_change
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.plan.record import GB, Plan, Usage, compiled
from puzzle_jax.plan.search import PlannedSearch
from puzzle_jax.plan.training_hours import distillation_seconds, policy_seconds
from puzzle_jax.search.hours.left import by_stage
from puzzle_jax.search.hours.measured import read_measured
from puzzle_jax.search.hours.work import SearchTime, hours_table
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of every plan.

    Attributes:
      hbm_gb: memory of a device, in 10^9 bytes.
      hardware: a known device, whose memory replaces hbm_gb ("h100").
      compiler: "cpu", or "gpu" for XLA's compiler for that hardware, where the extra `gpu-compiler` is installed.
      price_per_gpu_hour: price of one device for an hour, in any currency.
      json: prints JSON instead of a table.
    """

    hbm_gb: float = 80.0
    hardware: str | None = None
    compiler: str = "cpu"
    price_per_gpu_hour: float | None = None
    json: bool = False

    def check_price(self) -> None:
        """Raises ConfigError for a price below 0."""
        if self.price_per_gpu_hour is not None:
            check_range("price_per_gpu_hour", self.price_per_gpu_hour, 0)

    @property
    def device_bytes(self) -> int:
        """Memory of a device in bytes. Raises ConfigError where it is not above 0, or the hardware is unknown."""
        known = [name for name in HARDWARE if name != "local"]
        if self.hardware is not None and self.hardware not in known:
            hint = did_you_mean(self.hardware, known)
            raise ConfigError(f"hardware is {shown(self.hardware)}, but must be one of {', '.join(known)}{hint}")
        check_range("hbm_gb", self.hbm_gb, 0, above=True)
        return round(self.hbm_gb * GB) if self.hardware is None else int(HARDWARE[self.hardware].memory_bytes)


@dataclass(frozen=True)
class SearchPlan(Recipe, PlanSettings):
    """Settings of the plan of a search: the fields of its recipe and a few more.

    Attributes:
      parent: config.json, or a directory that has one.
      prompt_tokens: length of the longest prompt.
      answer_share: mean length of an answer, as a share of its limit; the hours depend on it.
      measured_by: run directory of a search of this model on the same devices, whose measured seconds per stage correct
        the roofline's; the lengths of prompts and answers are then taken from that search, too.
    """

    prompt_tokens: int = 1024
    answer_share: float = 0.5
    measured_by: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("answer_share", self.answer_share, 0, 1, above=True)
        self.check_price()


@dataclass(frozen=True)
class DistillPlan(DistillRecipe, PlanSettings):
    """Settings of the plan of a distillation: the fields of its recipe and a few more; no answers are read.

    Attributes:
      parent, child: config.json, or a directory that has one.
    """

    traces: Path | tuple[Path, ...] = Path("-")
    out: Path = Path("-")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_price()


@dataclass(frozen=True)
class GrpoPlan(GrpoRecipe, PlanSettings):
    """Settings of the plan of reinforcement learning: the fields of its recipe and a few more; no problems are read.

    Attributes:
      model: config.json, or a directory that has one.
      prompt_tokens: mean length of a prompt; the hours depend on it; None: what the longest answer leaves of a row.
      answer_share: mean length of an answer, as a share of its limit; the hours depend on it, too.
    """

    out: Path = Path("-")
    prompt_tokens: int | None = None
    answer_share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tokens is not None:
            check_range("prompt_tokens", self.prompt_tokens, 1, self.update.row_length)
        check_range("answer_share", self.answer_share, 0, 1, above=True)
        self.check_price()


def plan_search(settings: SearchPlan) -> None:
    """Prints the plan of a search. Raises PuzzleError for whatever cannot be used, before anything is compiled."""
    config, packed = read_model(settings.parent)
    if settings.measured_by is not None:
        read_measured(settings.measured_by)
    run = PlannedSearch(config, settings, packed, settings.prompt_tokens, settings.device_bytes)
    _show(run, settings, partial(_beside_search, run, settings))


def plan_distill(settings: DistillPlan) -> None:
    """Prints the plan of a distillation; raises as `plan_search` does."""
    parent, packed = read_model(settings.parent)
    child, _ = read_model(settings.child)
    run = PlannedDistillation(first_experts(parent, child, settings.parent, settings.child), settings, packed)
    _show(run, settings, lambda _: _training_hours(settings, partial(distillation_seconds, run)))


def plan_grpo(settings: GrpoPlan) -> None:
    """Prints the plan of reinforcement learning; raises as `plan_search` does."""
    config, packed = read_model(settings.model)
    run = PlannedPolicy(identity_child(config), settings, packed)
    longest = max(map(settings.rollout.limit, settings.prompts.efforts))
    prompt_tokens = settings.prompt_tokens or settings.update.row_length - longest
    asked = {"prompt_tokens": prompt_tokens, "answer_share": settings.answer_share}
    _show(run, settings, lambda _: _training_hours(settings, partial(policy_seconds, run, **asked)))


class Beside(NamedTuple):
    """The part of a plan that is not memory: lines and tables for readers, and the same values as JSON."""

    lines: Sequence[str | Table]
    json: Mapping[str, Json]


def _beside_search(run: PlannedSearch, settings: SearchPlan, found: Mapping[str, Usage]) -> Beside:
    """Hours, host memory and disk; and where the search does not fit, the smallest change that makes it fit."""
    lines: list[str | Table] = []
    values: dict[str, Json] = {}
    limit = settings.device_bytes
    if any(usage.total > limit for usage in found.values()):
        change = smallest_change(run, found, limit)
        lines.append("no change that was tried makes it fit" if change is None else str(change))
        values["smallest_change"] = None if change is None else {**change.settings}
    measured = None if settings.measured_by is None else read_measured(settings.measured_by)
    if measured is None and settings.hardware is None:
        return Beside([*lines, _NO_HARDWARE], values)
    hardware, lengths = HARDWARE.get(settings.hardware or ""), (settings.prompt_tokens, settings.answer_share)
    by = "by roofline, compiling not counted"
    if measured is not None:
        hardware, lengths = measured.hardware, (measured.prompt_tokens, measured.answer_share)
        by = f"by what the stages of {settings.measured_by} took"
    assert hardware is not None
    form: Form = "mxfp4" if run.packed else "bf16"
    stored: Form = "mxfp4" if run.stored_packed else "bf16"
    time = SearchTime(run.config, run.recipe, form, hardware, *lengths, stored=stored)
    seconds = time.seconds if measured is None else measured.seconds(by_stage(time))
    lines += [
        hours_table(seconds, run.recipe.mesh.devices, settings.price_per_gpu_hour),
        f"{by}, for answers of {time.answer_share:.0%} of their limits",
        f"host: {time.host_bytes / GB:.1f} GB of memory for each process, {time.disk_bytes / GB:.1f} GB of disk",
    ]
    values |= {"seconds": seconds, "host_bytes": time.host_bytes, "disk_bytes": time.disk_bytes}
    return Beside(lines, values)


def _training_hours(settings: DistillPlan | GrpoPlan, seconds_on: Callable[[Hardware], Mapping[str, Number]]) -> Beside:
    if settings.hardware is None:
        return Beside([_NO_HARDWARE], {})
    seconds = seconds_on(HARDWARE[settings.hardware])
    table = hours_table(seconds, settings.mesh.devices, settings.price_per_gpu_hour)
    share = f", for answers of {settings.answer_share:.0%} of their limits" if isinstance(settings, GrpoPlan) else ""
    return Beside([table, f"by roofline{share}; compiling is not counted"], {"seconds": seconds})


_NO_HARDWARE = "hours: name the devices (--hardware h100)"


def _show(
    run: PlannedSearch | PlannedDistillation | PlannedPolicy,
    settings: PlanSettings,
    beside: Callable[[Mapping[str, Usage]], Beside],
) -> None:
    by = compiler_named(settings.compiler, settings.hardware)
    virtual_devices(run.recipe.mesh.devices)
    with by.in_force():
        _compile_and_show(run, settings, beside)


def _compile_and_show(
    run: PlannedSearch | PlannedDistillation | PlannedPolicy,
    settings: PlanSettings,
    beside: Callable[[Mapping[str, Usage]], Beside],
) -> None:
    limit, devices = settings.device_bytes, run.recipe.mesh.devices
    _ = run.mesh
    console, out = plain_console(stderr=True), plain_console(width=120)
    console.print(f"compiling for {devices} virtual devices", highlight=False)
    found = compiled(run.programs)
    console.print(f"compiled in {sum(usage.seconds for usage in found.values()):.0f} seconds", highlight=False)
    changes = {name: run.changes(found, name, limit) for name, usage in found.items() if usage.total > limit}
    plan = Plan(run.about, found, limit, run.labels, changes, run.notes)
    more = beside(found)
    if settings.json:
        print(json.dumps({**plan.to_json(), **more.json}, indent=2))
        return
    for line in (*plan.about, plan.table(), *plan.verdict(), *more.lines, *plan.notes):
        out.print(line, highlight=False, soft_wrap=isinstance(line, str))
