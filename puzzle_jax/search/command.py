"""`puzzle search`: everything that is not up to date, or one stage."""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_jax.commands import did_you_mean
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.search.context import Search
from puzzle_jax.search.parent import open_parent
from puzzle_jax.search.pipeline import STAGE_NAMES, run_stages
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.workers import Team, run_worker

PROGRAM = "puzzle search"


@dataclass(frozen=True)
class SearchSettings(Recipe):
    """One search, and how much of it is run.

    Attributes:
      stage: one stage, or "all".
    """

    stage: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (names := ("all", *STAGE_NAMES)):
            hint = did_you_mean(self.stage, names)
            raise ConfigError(f"stage is {shown(self.stage)}, but must be one of {', '.join(names)}{hint}")


def run(settings: SearchSettings) -> None:
    """Runs the stages that are not up to date, in the primary process; the others work for it."""
    with Team.join(settings.mesh.processes, settings.mesh.devices, program=PROGRAM) as team:
        if team.index:
            run_worker(team, open_parent(settings))
        else:
            run_stages(Search(settings, team=team), settings.stage)
