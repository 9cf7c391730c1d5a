"""`puzzle search`: everything that is not up to date, or one stage."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import ConfigError, PuzzleWarning, shown
from puzzle_jax.processes.distributed import joined, process_index
from puzzle_jax.processes.scratch import scratch_directory
from puzzle_jax.search.context import Search
from puzzle_jax.search.pipeline import run_stages, stages_of
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.stages import StageResult

PROGRAM = "puzzle search"


@dataclass(frozen=True)
class SearchSettings(Recipe):
    """Settings of one search, and which of its stages are run.

    Attributes:
      stage: the stage to run, or "all".
    """

    stage: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (names := ("all", *(stage.name for stage in stages_of(self)))):
            hint = did_you_mean(self.stage, names)
            raise ConfigError(f"stage is {shown(self.stage)}, but must be one of {', '.join(names)}{hint}")


def run(settings: SearchSettings) -> None:
    """Runs outdated stages in all processes; only the primary one has the run directory and reports progress."""
    processes = settings.mesh.processes
    with joined(processes, settings.mesh.devices // processes, program=PROGRAM):
        run_search(settings, stage=settings.stage)


def run_search(recipe: Recipe, console: Console | None = None, stage: str = "all") -> list[StageResult]:
    """Does the same in processes that have already joined; returns the stages' results in the primary process."""
    copies = None
    with ExitStack() as contexts:
        if process_index():
            copies = contexts.enter_context(scratch_directory())
            contexts.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", PuzzleWarning)  # the primary process gives the same warnings
        return run_stages(Search(recipe, console, copies), stage)
