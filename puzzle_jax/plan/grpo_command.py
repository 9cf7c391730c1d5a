"""`python -m puzzle_jax.train plan-grpo`: what reinforcement learning needs on every device, before there are devices.

Of the model config.json is read, of the recipe its fields, and no file of problems. The compiler is XLA's for CPUs, on
virtual devices; see `plan.grpo` for what its figures are worth.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import ConfigError
from puzzle_jax.plan.grpo import SCORE, PhaseMemory, PlannedPolicy, plan_policy
from puzzle_jax.plan.grpo_arithmetic import changes, slot_cache_bytes, step_needs
from puzzle_jax.plan.programs import GB, device_limit, read_model, virtual_devices
from puzzle_jax.settings.files import recipe_names
from puzzle_jax.train.grpo.command import parse_recipe
from puzzle_jax.train.grpo.recipe import GrpoRecipe

_FIELD = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*=.*", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""

    def add(flag: str, **options: Any) -> None:
        parser.add_argument(flag, **options)

    add("--model", type=Path, required=True, metavar="CONFIG|DIR", help="config.json, or a directory that has one")
    names = ", ".join(recipe_names("grpo"))
    add("--recipe", required=True, metavar="NAME|FILE", help=f"settings: a YAML file, or one of {names}")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields in the place of the recipe's")
    add("--hbm-gb", type=float, default=80.0, metavar="GB", help="memory of a device, in 10^9 bytes (default: 80.0)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Reads, compiles, prints.

    Raises PuzzleError for whatever cannot be used, before anything is compiled.
    """
    limit = device_limit(options)
    config, packed = read_model(options.model)
    policy = PlannedPolicy(config, _recipe(options), packed)
    devices = policy.recipe.mesh.devices
    virtual_devices(devices)
    policy.make_mesh()
    console.print(f"compiling for {devices} virtual devices", highlight=False)
    began = time.monotonic()
    found = plan_policy(policy)
    console.print(f"compiled in {time.monotonic() - began:.0f} seconds", highlight=False)
    out = plain_console()
    for line in _head(policy, options):
        out.print(line, highlight=False, soft_wrap=True)
    out.print(_table(policy, found, limit))
    for line in (*_verdict(policy, found, limit), *_step(policy), *_notes(policy, found)):
        out.print(line, highlight=False, soft_wrap=True)


def _recipe(options: argparse.Namespace) -> GrpoRecipe:
    for text in options.set:
        if not _FIELD.fullmatch(text):
            raise ConfigError(f"--set has {text!r}, but must be FIELD=VALUE with a field of the recipe")
    arguments = ["--recipe", options.recipe, "--model", str(options.model), "--out", "-"]
    return parse_recipe([*arguments, *(f"--{text}" for text in options.set)], "python -m puzzle_jax.train plan-grpo")


# Output ---------------------------------------------------------------------------------------------------------------


def _head(policy: PlannedPolicy, options: argparse.Namespace) -> list[str]:
    recipe = policy.recipe
    mesh, limits = recipe.mesh, {effort: recipe.rollout.limit(effort) for effort in recipe.prompts.efforts}
    answers = ", ".join(f"{limit:,} at {effort} effort" for effort, limit in limits.items())
    return [
        f"{options.model.name} by {options.recipe} on {mesh.data} x {mesh.sequence} x {mesh.model} devices",
        f"{recipe.prompts.prompts} prompts x {recipe.rollout.group} answers a step, tokens up to {answers}",
    ]


def _table(policy: PlannedPolicy, found: Mapping[str, PhaseMemory], limit: float) -> Table:
    table = Table("GB per device", *found)
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, sizes: list[Any]) -> None:
        if any(sizes):
            table.add_row(name, *(f"{size / GB:,.3f}" if size else "" for size in sizes))

    names = {
        "experts": f"resident experts, {'MXFP4' if policy.packed else 'bfloat16'}",
        "resident": "resident, all else, bfloat16",
        "masters": "masters, float32",
        "optimizer": f"optimiser state, {policy.recipe.optimizer.name}",
        "copy": "weights laid apart for the sampler",
        "caches": f"caches of {policy.recipe.rollout.slots} slots",
        "slots": "their logits, tokens, experts",
        "group": f"{policy.group_rows} rows whose prompts are run",
        "batch": "micro-batch",
        "sums": "sums of gradients, float32",
        "temporaries": "temporaries",
        "decoded": "one layer's experts, decoded",
    }
    phases = [asdict(memory) for memory in found.values()]
    for name, shown in names.items():
        if name == "temporaries":
            table.add_section()
        add(shown, [sizes[name] for sizes in phases])
    table.add_section()
    add("total", [memory.total for memory in found.values()])
    add("of a device's", [limit] * len(found))
    return table


def _verdict(policy: PlannedPolicy, found: Mapping[str, PhaseMemory], limit: float) -> list[str]:
    """Whether it fits, and if not, what would, phase by phase."""
    most = max(memory.total for memory in found.values())
    if most <= limit:
        return [f"fits: {(limit - most) / GB:.1f} GB are left"]
    lines = []
    for phase, memory in found.items():
        if memory.total <= limit:
            continue
        lines.append(f"{phase} does not fit: {(memory.total - limit) / GB:.1f} GB too many")
        would = changes(policy, found, phase, int(limit))
        if would:
            lines[-1] += "; for it, each of these alone should do (about, plan it to know):"
        else:
            lines[-1] += "; no one change is enough"
        for change in would:
            fields = " ".join(_differences(policy.recipe, change.run.recipe))
            lines.append(f"  {change.what}: --set {fields}: {change.total / GB:.1f} GB")
    return lines


def _differences(one: GrpoRecipe, other: GrpoRecipe) -> list[str]:
    """What of another recipe is different, as `--set` takes it."""
    found = []
    for section in ("rollout", "update", "mesh"):
        before, after = asdict(getattr(one, section)), asdict(getattr(other, section))
        for name, value in after.items():
            if before[name] == value:
                continue
            if isinstance(value, Mapping):
                found += [f"{section}.{name}.{key}={each}" for key, each in value.items()]
            else:
                found.append(f"{section}.{name}={value}")
    return found


def _step(policy: PlannedPolicy) -> list[str]:
    """What a step asks for."""
    needs, recipe = step_needs(policy), policy.recipe
    lines = [
        f"a step at most: {needs.answers:,} answers of {needs.tokens / 1e6:,.1f} million tokens, "
        f"{needs.rows:,} rows of {recipe.update.row_length:,}, {needs.micro_batches:,} micro-batches",
        f"a slot: {policy.context:,} positions, "
        f"{slot_cache_bytes(policy) / GB:.2f} GB of caches on all devices together",
    ]
    if needs.expert_bytes:
        size = needs.expert_bytes / GB
        lines.append(
            f"on the host: experts of all answers, {size:,.1f} GB at most, and {3 * size:,.1f} GB while rows are packed"
        )
    return lines


def _notes(policy: PlannedPolicy, found: Mapping[str, PhaseMemory]) -> list[str]:
    """What the figures are."""
    lines = ["compiled by XLA for CPUs, in float16 for bfloat16"]
    if SCORE not in found:
        lines.append("nothing is scored: one update per step, and no reference")
    mesh, config = policy.recipe.mesh, policy.config
    if policy.recipe.rollout.slots % policy.row_parts:
        lines.append(f"slots are whole on every part of the mesh: {mesh.data} x {mesh.sequence} do not divide them")
    if config.num_kv_heads % mesh.model:
        lines.append(
            f"caches are whole on every device of the model axis: {mesh.model} do not divide "
            f"{config.num_kv_heads} key-value heads"
        )
    undivided = [block.num_experts for block in config.blocks if block.num_experts % mesh.model]
    if undivided:
        lines.append(f"experts are whole on every device: {mesh.model} devices do not divide {undivided[0]}")
    return lines
