"""`puzzle run`: the whole road, or one stage of it, or in a dry run what all of it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from puzzle_jax.codec import to_plain
from puzzle_jax.consoles import plain_console
from puzzle_jax.files import write_beside
from puzzle_jax.processes.distributed import joined
from puzzle_jax.run.derived import derived_lines
from puzzle_jax.run.places import SETTINGS_FILE, STAGE_SETTINGS
from puzzle_jax.run.settings import RunSettings

PROGRAM = "puzzle run"
_TOP = ("stage", "dry_run", "price_per_gpu_hour")
"""Settings of one call, which are no part of the run."""

_RUN_BY = {
    "search": "puzzle search",
    "traces": "puzzle train traces",
    "distill": "puzzle train distill",
    "accuracy": "puzzle train grpo",
    "length": "puzzle train grpo",
    "control": "puzzle train grpo",
    "average": "puzzle train average",
    "evaluate": "puzzle evaluate",
}


def run(settings: RunSettings) -> None:
    """Runs the stages that are not up to date, in all processes.

    Raises `PuzzleError` for whatever cannot be used, before any stage runs.
    """
    console = plain_console(width=150)
    if settings.dry_run:
        from puzzle_jax.run.dry import show_plan

        show_derived(settings, console)
        show_plan(settings, console)
        return
    mesh = settings.joined_mesh
    with joined(mesh.processes, mesh.devices // mesh.processes, program=PROGRAM):
        from puzzle_jax.run.page import show_page
        from puzzle_jax.run.pipeline import run_road
        from puzzle_jax.run.road import Road

        road = Road(settings, console)
        if road.primary:
            show_derived(settings, road.console)
            write_settings(settings)
        run_road(road)
        if road.primary and settings.stage in ("all", "report"):
            show_page(road.run, road.console)


def show_derived(settings: RunSettings, console: Console) -> None:
    """Prints what was filled in, and why."""
    if not settings.derived:
        return
    table = Table("setting", "value", "why", title="Derived from the parent, the tasks and the deployment")
    for row in derived_lines(settings.derived):
        table.add_row(*row)
    console.print(table)


def write_settings(settings: RunSettings) -> None:
    """RUN/settings.yaml with everything, and RUN/settings/STAGE.yaml for each stage that has a verb of its own."""
    values = resolved(settings)
    _write_yaml(settings.run / SETTINGS_FILE, values)
    values["control"] = to_plain(settings.control_recipe)
    (settings.run / STAGE_SETTINGS).mkdir(exist_ok=True)
    for name in settings.stages:
        if name in _RUN_BY:
            head = f"{_RUN_BY[name]} --recipe {settings.run / STAGE_SETTINGS / name}.yaml"
            _write_yaml(settings.run / STAGE_SETTINGS / f"{name}.yaml", values[name], head)


def resolved(settings: RunSettings) -> dict[str, Any]:
    """All settings of a run as a recipe has them."""
    return {name: value for name, value in to_plain(settings).items() if name not in _TOP}


def _write_yaml(path: Path, values: Mapping[str, Any], head: str = "") -> None:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    write_beside(path, (f"# {head}\n{text}" if head else text).encode())
