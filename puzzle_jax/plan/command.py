"""`puzzle plan search|distill|grpo`: what a run needs on every device, before there are devices.

A plan takes the settings of the run that it is for, and some of its own. Of models config.json is read and nothing
else, nor any file of traces or problems. `plan.compilers` says who compiles, and what the figures are worth.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.commands import did_you_mean
from puzzle_jax.consoles import plain_console
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.errors import ConfigError, check_range, shown
from puzzle_jax.model.child import identity_child
from puzzle_jax.plan.abstract import read_model, virtual_devices
from puzzle_jax.plan.compilers import compiler_named
from puzzle_jax.plan.distill import PlannedDistillation, first_experts
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.plan.record import GB, Plan, compiled
from puzzle_jax.plan.search import PlannedSearch
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.train.distill.recipe import DistillRecipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Settings of every plan.

    Attributes:
      hbm_gb: memory of a device, in 10^9 bytes.
      hardware: a device whose memory there is, in the place of hbm_gb ("h100").
      compiler: "cpu", or "gpu" for XLA's compiler for that hardware, where the extra `gpu-compiler` is installed.
      json: prints JSON in the place of a table.
    """

    hbm_gb: float = 80.0
    hardware: str | None = None
    compiler: str = "cpu"
    json: bool = False

    @property
    def device_bytes(self) -> int:
        """Memory of a device. Raises ConfigError where there is none, or the hardware is not known."""
        known = [name for name in HARDWARE if name != "local"]
        if self.hardware is not None and self.hardware not in known:
            hint = did_you_mean(self.hardware, known)
            raise ConfigError(f"hardware is {shown(self.hardware)}, but must be one of {', '.join(known)}{hint}")
        check_range("hbm_gb", self.hbm_gb, 0, above=True)
        return round(self.hbm_gb * GB) if self.hardware is None else int(HARDWARE[self.hardware].memory_bytes)


@dataclass(frozen=True)
class SearchPlan(Recipe, PlanSettings):
    """The plan of a search, by any field of its recipe and some more.

    Attributes:
      parent: config.json, or a directory that has one.
      prompt_tokens: length of the longest prompt.
    """

    prompt_tokens: int = 1024


@dataclass(frozen=True)
class DistillPlan(DistillRecipe, PlanSettings):
    """The plan of a distillation, by any field of its recipe; no answers are read.

    Attributes:
      parent, child: config.json, or a directory that has one.
    """

    traces: Path | tuple[Path, ...] = Path("-")
    out: Path = Path("-")


@dataclass(frozen=True)
class GrpoPlan(GrpoRecipe, PlanSettings):
    """The plan of reinforcement learning, by any field of its recipe; no problems are read.

    Attributes:
      model: config.json, or a directory that has one.
    """

    out: Path = Path("-")


def plan_search(settings: SearchPlan) -> None:
    """Prints the plan of a search. Raises PuzzleError for whatever cannot be used, before anything is compiled."""
    config, packed = read_model(settings.parent)
    _show(PlannedSearch(config, settings, packed, settings.prompt_tokens, settings.device_bytes), settings)


def plan_distill(settings: DistillPlan) -> None:
    """Prints the plan of a distillation, likewise."""
    parent, packed = read_model(settings.parent)
    child, _ = read_model(settings.child)
    view = first_experts(parent, child, settings.parent, settings.child)
    _show(PlannedDistillation(view, settings, packed), settings)


def plan_grpo(settings: GrpoPlan) -> None:
    """Prints the plan of reinforcement learning, likewise."""
    config, packed = read_model(settings.model)
    _show(PlannedPolicy(identity_child(config), settings, packed), settings)


def _show(run: PlannedSearch | PlannedDistillation | PlannedPolicy, settings: PlanSettings) -> None:
    by = compiler_named(settings.compiler, settings.hardware)
    virtual_devices(run.recipe.mesh.devices)
    with by.in_force():
        _compile_and_show(run, settings)


def _compile_and_show(run: PlannedSearch | PlannedDistillation | PlannedPolicy, settings: PlanSettings) -> None:
    limit, devices = settings.device_bytes, run.recipe.mesh.devices
    _ = run.mesh
    console, out = plain_console(stderr=True), plain_console(width=120)
    console.print(f"compiling for {devices} virtual devices", highlight=False)
    found = compiled(run.programs)
    console.print(f"compiled in {sum(usage.seconds for usage in found.values()):.0f} seconds", highlight=False)
    changes = {name: run.changes(found, name, limit) for name, usage in found.items() if usage.total > limit}
    plan = Plan(run.about, found, limit, run.labels, changes, run.notes)
    if settings.json:
        print(json.dumps(plan.to_json(), indent=2))
        return
    for line in (*plan.about, plan.table(), *plan.verdict(), *plan.notes):
        out.print(line, highlight=False, soft_wrap=isinstance(line, str))
