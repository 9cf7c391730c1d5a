"""The context that the stages of a run share: settings, directory and models. `run.places` says where files lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.tensors.fingerprint import fingerprint_of
from puzzle_jax.processes.distributed import on_primary, primary_console, process_index
from puzzle_jax.run.places import ANSWERS, CHILD
from puzzle_jax.run.settings import RunSettings
from puzzle_jax.runs import open_run


class Road:
    """One run in one directory, which all processes can access.

    Raises `PuzzleError` for a parent that is not a checkpoint, and for a directory that holds something else.
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
        """The checkpoint that a stage makes."""
        return self.run / stage / CHILD

    @property
    def models(self) -> Mapping[str, Path]:
        """Checkpoints of the final table by name: the parent, the control, and the child after each stage."""
        return self.settings.evaluate.models


def run_identity(parent: Path) -> dict[str, str]:
    """The identity of a run's directory: the content of the parent's weights."""
    return {"kind": "road", "parent": fingerprint_of(describe_checkpoint(parent))}
