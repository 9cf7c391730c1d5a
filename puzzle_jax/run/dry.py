"""A dry run: what every stage needs in memory, time, disk and money, before there are devices.

Memory is that of a stage's largest program, compiled for virtual devices as `puzzle plan` does; seconds are roofline
estimates on the deployment's hardware, without compiling. The child is taken to be as large as its parent, which is
the most it can be, and answers to take half of their limits.

    RUN/plan.json    the same as JSON

Left out: what stages other than the search need of the host, and the speed measurements of an evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import jax
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form, tensor_bytes
from puzzle_jax.costs.hardware import Hardware, hardware_named
from puzzle_jax.errors import ConfigError
from puzzle_jax.files import write_beside
from puzzle_jax.model.child import identity_child
from puzzle_jax.model.spec import EXPERT_MATRICES, is_spec, param_specs
from puzzle_jax.plan.abstract import read_model, virtual_devices
from puzzle_jax.plan.distill import PlannedDistillation
from puzzle_jax.plan.grpo import PlannedPolicy
from puzzle_jax.plan.record import GB, Usage, compiled
from puzzle_jax.plan.search import PlannedSearch
from puzzle_jax.plan.training_hours import distillation_seconds, policy_seconds
from puzzle_jax.run.resolved import write_settings
from puzzle_jax.run.road import run_identity
from puzzle_jax.run.settings import RunSettings
from puzzle_jax.runs import open_run
from puzzle_jax.search.hours.passes import ModelTime
from puzzle_jax.search.hours.work import SearchTime
from puzzle_jax.settings.mesh import MeshSettings
from puzzle_jax.train.grpo.recipe import GrpoRecipe
from puzzle_jax.train.loop import LoopSettings

ANSWER_SHARE = 0.5
_STATE_BYTES = 12  # per trained parameter: the fp32 master weight and two moments


@dataclass(frozen=True)
class Need:
    """The needs of a stage.

    Attributes:
      program: name of its largest program; empty where it runs none of its own.
      device_bytes: memory of that program on a device.
      seconds: time of the whole stage.
      devices: number of devices that work on it.
      disk_bytes: size of its files.
    """

    program: str
    device_bytes: int
    seconds: float
    devices: int
    disk_bytes: int = 0


@dataclass(frozen=True)
class RunPlan:
    """The stages of a run on given hardware.

    Attributes:
      packed: whether the parent's experts are stored as MXFP4.
      prompt_tokens: assumed length of every prompt.
    """

    settings: RunSettings
    config: ModelConfig
    packed: bool
    hardware: Hardware
    prompt_tokens: int

    @cached_property
    def needs(self) -> dict[str, Need]:
        """The needs of every stage, in order. Compiling the programs of a large model takes some minutes."""
        recipes: dict[str, Need] = {}
        settings = self.settings
        found = {"search": self._search(), "traces": self._asked("traces"), "distill": self._distill()}
        for name, recipe in (("accuracy", settings.accuracy), ("length", settings.length)):
            shape = repr([recipe.update, recipe.rollout, recipe.prompts.prompts, recipe.mesh, recipe.loss.kl])
            if shape not in recipes:
                recipes[shape] = self._policy(recipe)
            found[name] = replace(recipes[shape], seconds=self._policy_seconds(recipe))
        found["average"] = self._asked("average")
        if settings.control:
            found["control"] = found["accuracy"]
        return found | {"evaluate": self._asked("evaluate")}

    # Stages ---------------------------------------------------------------------------------------------------------

    @property
    def form(self) -> Form:
        return "mxfp4" if self.packed else "bf16"

    @property
    def memory(self) -> int:
        return int(self.hardware.memory_bytes)

    def _search(self) -> Need:
        recipe = self.settings.search
        run = PlannedSearch(self.config, recipe, self.packed, self.prompt_tokens, self.memory)
        form: Form = "mxfp4" if run.packed else "bf16"
        time = SearchTime(self.config, recipe, form, self.hardware, self.prompt_tokens, ANSWER_SHARE, stored=self.form)
        return _need(compiled(run.programs), sum(time.seconds.values()), recipe.mesh, time.disk_bytes)

    def _distill(self) -> Need:
        recipe = self.settings.distill
        run = PlannedDistillation(identity_child(self.config), recipe, self.packed)
        seconds = sum(distillation_seconds(run, self.hardware).values())
        return _need(compiled(run.programs), seconds, recipe.mesh, self._training_disk(recipe.loop))

    def _policy(self, recipe: GrpoRecipe) -> Need:
        run = PlannedPolicy(identity_child(self.config), recipe, self.packed)
        return _need(compiled(run.programs), 0.0, recipe.mesh, self._training_disk(recipe.loop))

    def _policy_seconds(self, recipe: GrpoRecipe) -> float:
        run = PlannedPolicy(identity_child(self.config), recipe, self.packed)
        asked = {"prompt_tokens": self.prompt_tokens, "answer_share": ANSWER_SHARE}
        return sum(policy_seconds(run, self.hardware, **asked).values())

    def _asked(self, name: str) -> Need:
        """The needs of a stage that asks one model after another; its programs are those of the search's traces."""
        settings, section = self.settings, getattr(self.settings, name)
        mesh = section.mesh if name == "traces" else MeshSettings()
        time = ModelTime(self.config, self.form, self.hardware, mesh.data, mesh.model)
        models = {
            "traces": 1,
            "average": len(settings.average.weights) + (settings.average.reference is not None),
            "evaluate": len(settings.evaluate.models),
        }
        asked, slots = section.problems or 0, section.slots if name == "evaluate" else section.batch_size
        counts = asked if isinstance(asked, Mapping) else dict.fromkeys(section.efforts, asked)
        tasks = 1 if name == "evaluate" else len(section.tasks)
        each = sum(
            time.answering(self.prompt_tokens, ANSWER_SHARE * limit, tasks * counts[effort], slots)
            for effort, limit in section.max_tokens.items()
            if effort in section.efforts
        )
        disk = tensor_bytes(self.config, self.form) if name == "average" else 0
        return Need("", 0, models[name] * each, mesh.devices, disk)

    def _training_disk(self, loop: LoopSettings) -> int:
        """Bytes of the checkpoints that are kept, and of the trained model."""
        specs = jax.tree_util.tree_leaves_with_path(param_specs(self.config), is_leaf=is_spec)
        trained = sum(math.prod(spec.shape) for path, spec in specs if path[-1].key not in EXPERT_MATRICES)
        return (loop.keep_last + loop.keep_best) * _STATE_BYTES * trained + tensor_bytes(self.config, self.form)


def show_plan(settings: RunSettings, console: Console) -> None:
    """Prints what every stage needs, and writes it and all settings into the run's directory.

    Raises ConfigError where the deployment's hardware has no data sheet and is not the machine at hand.
    """
    devices = max(recipe.mesh.devices for recipe in (settings.search, settings.distill, settings.accuracy))
    virtual_devices(devices)
    config, packed = read_model(settings.parent)
    hardware = hardware_named(settings.search.scenario.hardware)
    row = settings.accuracy.update.row_length
    longest = max(settings.accuracy.rollout.limit(effort) for effort in settings.efforts)
    plan = RunPlan(settings, config, packed, hardware, max(1, row - longest))
    console.print(f"compiling every stage's programs for {devices} virtual devices", highlight=False)
    needs = plan.needs
    console.print(plan_table(needs, plan.memory, settings.price_per_gpu_hour))
    too_large = [name for name, need in needs.items() if need.device_bytes > plan.memory]
    verdict = f"too large for {hardware.name}: {', '.join(too_large)}" if too_large else f"fits {hardware.name}"
    console.print(verdict, highlight=False)
    open_run(settings.run, run_identity(settings.parent))
    write_settings(settings)
    content = {"hardware": hardware.name, "stages": {name: asdict(need) for name, need in needs.items()}}
    write_beside(settings.run / "plan.json", (json.dumps(content, indent=1) + "\n").encode())
    console.print(f"settings and plan: {settings.run}", highlight=False, soft_wrap=True)
    if too_large:
        raise ConfigError(f"{', '.join(too_large)} need more than the {plan.memory / GB:.0f} GB of {hardware.name}")


def plan_table(needs: Mapping[str, Need], memory: int, price: float | None) -> Table:
    """The table of what stages need, with totals."""
    columns = ["stage", "largest program", f"GB of {memory / GB:.0f}", "hours", "device hours", "disk, GB"]
    table = Table(*columns, *([] if price is None else ["price"]))
    for column in table.columns[2:]:
        column.justify = "right"
    hours = [(name, need, need.seconds / 3600) for name, need in needs.items()]
    for name, need, spent in hours:
        paid = [] if price is None else [f"{spent * need.devices * price:,.2f}"]
        size = f"{need.device_bytes / GB:.1f}" if need.device_bytes else ""
        disk = f"{need.disk_bytes / GB:.1f}"
        table.add_row(name, need.program, size, f"{spent:,.2f}", f"{spent * need.devices:,.2f}", disk, *paid)
    table.add_section()
    device_hours = sum(spent * need.devices for _, need, spent in hours)
    paid = [] if price is None else [f"{device_hours * price:,.2f}"]
    total = sum(spent for *_, spent in hours)
    disk = sum(need.disk_bytes for need in needs.values())
    table.add_row("total", "", "", f"{total:,.2f}", f"{device_hours:,.2f}", f"{disk / GB:.1f}", *paid)
    return table


def _need(found: Mapping[str, Usage], seconds: float, mesh: MeshSettings, disk_bytes: int) -> Need:
    largest = max(found, key=lambda name: found[name].total)
    return Need(largest, found[largest].total, float(seconds), mesh.devices, disk_bytes)
