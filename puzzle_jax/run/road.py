"""The context that the stages of a run share: its settings, its directory, and where each stage's files lie.

    RUN/run.json, settings.yaml     the run, and all settings as they were resolved
    RUN/settings/STAGE.yaml         a stage's own, for its verb alone (`puzzle train grpo --recipe ...`)
    RUN/search/                     a search as `puzzle search` runs it, with stages of its own
    RUN/traces/answers.parquet      the parent's answers that the child is distilled on
    RUN/distill/, accuracy/, length/, control/   runs of training, each with its checkpoints, report and child/
    RUN/average/child/              the average of both policies, with the scales of its FP8 cache
    RUN/evaluate/                   an evaluation as `puzzle evaluate` makes one
    RUN/child/                      the checkpoint to serve, with what was measured on its card
    RUN/report/                     the page of the run
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.processes.distributed import on_primary, primary_console, process_index
from puzzle_jax.run.settings import RunSettings
from puzzle_jax.runs import open_run

CHILD = "child"
ANSWERS = "answers.parquet"
SETTINGS_FILE, STAGE_SETTINGS = "settings.yaml", "settings"


class Road:
    """One run in one directory, which all processes reach.

    Raises `PuzzleError` for a parent that is no checkpoint, and a directory that holds something else.
    """

    def __init__(self, settings: RunSettings, console: Console | None = None) -> None:
        self.settings, self.run, self.primary = settings, settings.run, process_index() == 0
        self.console = primary_console(console or plain_console(width=150))
        on_primary("open the run", lambda: open_run(self.run, run_identity(settings.parent)))

    @property
    def answers(self) -> Path:
        """The parent's answers."""
        return self.run / "traces" / ANSWERS

    def child_of(self, stage: str) -> Path:
        """The checkpoint that a stage has made."""
        return self.run / stage / CHILD

    @property
    def models(self) -> dict[str, Path]:
        """Checkpoints of the last table by name: the parent, with its control, and the child after each stage."""
        control = {"control": self.child_of("control")} if self.settings.control else {}
        made = {name: self.child_of(stage) for name, stage in _MADE.items()}
        return {"parent": self.settings.parent, **control, **made}


FINAL = "final"
"""The average with an FP8 cache, which is what is served."""

_MADE = {
    "cut": "search",
    "distilled": "distill",
    "accuracy": "accuracy",
    "length": "length",
    "average": "average",
    FINAL: "average",
}


def run_identity(parent: Path) -> dict[str, str]:
    """The identity of a run's directory: the content of the parent's weights."""
    return {"kind": "road", "parent": fingerprint_of(describe_checkpoint(parent))}
