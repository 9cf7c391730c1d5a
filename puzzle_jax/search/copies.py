"""A search of several processes as stages of one run directory, which only the primary process needs.

Every process runs the work of a stage, on one mesh over all of them, so each must read what earlier stages have
written and what a killed run has left. The primary process decides whether a stage is up to date, holds the run
directory and writes it. Before a stage's work it sends the others the files that the work may read and that they do
not have yet, in the form that they have on disk; the others keep them in a directory of their own, where they also
write what nobody will read. So a stage's function is the same in all processes, and finds the same files.
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
    """Runs a stage in all processes, unless it is up to date; returns how it went in the primary one.

    Raises `PuzzleError` as `Stage.run`, in the primary process, which ends the others.
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
    """What the processes of a search know of the primary one's run directory.

    Args:
      run: that directory, or in other processes the one where copies are kept.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change

    def send(self, kept: Path) -> None:
        """By the primary process: files that have changed, and the intermediate results of the stage that begins."""
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
        """By the primary process: the stage has no work."""
        decided(lambda: None)

    def receive(self) -> Path | None:
        """By the others: waits for `send` or `skip`; the directory of intermediate results, or None without work."""
        message = decided(lambda: None)
        if message is None:
            return None
        for left in self._run.glob(".*"):
            shutil.rmtree(left)  # intermediate results of the stage before
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
