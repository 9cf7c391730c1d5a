"""`puzzle run`: the whole pipeline, or one stage of it, or in a dry run what all of it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.processes.distributed import joined
from puzzle_jax.run.resolved import write_settings
from puzzle_jax.run.settings import RunSettings

PROGRAM = "puzzle run"


def run(settings: RunSettings) -> None:
    """Runs the stages that are not up to date, in all processes.

    Raises `PuzzleError` for anything that cannot be used, before any stage runs.
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


def derived_lines(reasons: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """The name, the value and the reason of every setting that was derived."""
    for name, text in reasons.items():
        value, _, why = text.partition(": ")
        yield name, value, why
