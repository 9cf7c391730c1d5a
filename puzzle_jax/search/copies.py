"""Runs the stages of a search in several processes, of which only the primary one needs the run directory.

Every process does the work of a stage, on one mesh over all of them, so each must read what earlier stages have
written and what a killed run has left. The primary process decides whether a stage is up to date, and alone reads and
writes the run directory. Before a stage's work it broadcasts the files that the work may read and that the others do
not have yet, byte for byte; the others keep them in a directory of their own, where they also write outputs that
nobody will read. A stage's function is therefore the same in all processes and finds the same files.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from puzzle_jax.processes.distributed import process_count, process_index
from puzzle_jax.processes.published import decided, published
from puzzle_jax.search.artifacts import COPIED
from puzzle_jax.search.context import Search
from puzzle_jax.stages import Stage, StageResult


def run_stage(stage: Stage[Search], search: Search, copies: Copies) -> StageResult | None:
    """Runs a stage in all processes, unless it is up to date; returns its result in the primary process.

    Raises `PuzzleError` as `Stage.run` does, in the primary process, which ends the others.
    """
    if process_count() == 1:
        return stage.run(search.run, search)
    if process_index() != 0:
        kept = copies.receive()
        if kept is not None:
            out = search.run / f"out-{stage.name}"
            out.mkdir()
            stage.produce(search, out, kept)
            shutil.rmtree(out)
        return None

    def produce(search: Search, out: Path, kept: Path) -> None:
        copies.send(kept)
        stage.produce(search, out, kept)

    result = replace(stage, produce=produce).run(search.run, search)
    if result.skipped:
        copies.skip()
    return result


class Copies:
    """Keeps copies of the primary process's files up to date in the other processes of a search.

    Args:
      run: the run directory, or in the other processes the directory of copies.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._sent: dict[str, tuple[int, int]] = {}  # size and modification time

    def send(self, kept: Path) -> None:
        """In the primary process: sends changed files, and the intermediate results of the stage that begins."""
        found = {name: _state(self._run / name) for name in COPIED if (self._run / name).is_file()}
        gone = [name for name in self._sent if name not in found]
        new = [name for name, state in found.items() if self._sent.get(name) != state]
        self._sent = found
        if kept.is_dir():
            new += [f"{kept.name}/{file.name}" for file in sorted(kept.iterdir()) if file.is_file()]
        decided(lambda: {"kept": kept.name, "new": new, "gone": gone})
        for name in new:
            published((self._run / name).read_bytes)

    def skip(self) -> None:
        """In the primary process: announces that the stage has no work."""
        decided(lambda: None)

    def receive(self) -> Path | None:
        """In the others: waits for `send` or `skip`; returns the intermediate results' directory, None without work."""
        message = decided(lambda: None)
        if message is None:
            return None
        for left in self._run.glob(".*"):
            shutil.rmtree(left)  # intermediate results of the previous stage
        for name in message["gone"]:
            (self._run / name).unlink()
        for name in message["new"]:
            file = self._run / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(published(bytes))
        return self._run / message["kept"]


def _state(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
