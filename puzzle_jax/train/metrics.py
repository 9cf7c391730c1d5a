"""Metrics of training steps: metrics.jsonl, and TensorBoard where tensorboardX is installed.

metrics.jsonl has a line per logged step, {"step": ..., NAME: number or null}; null stands for a value that is not
finite. A run that resumes after step s drops the lines of later steps, so that the file is what an uninterrupted run
would have written.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from puzzle_jax.files import write_beside
from puzzle_jax.runs import METRICS_FILE, read_metrics

TENSORBOARD = "tensorboard"


class MetricsLog:
    """Writes the metrics of a run, from one process; a context manager.

    Args:
      directory: directory of the run.
      after: step that the run resumes from; 0 for a new run.
      console: console for a note, printed once, if there is no TensorBoard.

    Attributes:
      last: the values of the last line.

    Raises PuzzleError as `read_metrics` does.
    """

    def __init__(self, directory: Path, after: int, console: Console) -> None:
        path = directory / METRICS_FILE
        # A run that begins anew writes step 0 again.
        kept = [line for line in (read_metrics(path) if after and path.exists() else []) if line["step"] <= after]
        self.last: dict[str, int | float | None] = kept[-1] if kept else {}
        write_beside(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = open(path, "ab")  # noqa: SIM115 (closed on exit)
        self._board = _tensorboard(directory / TENSORBOARD, after, console)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the line of a step."""
        self.last = {"step": step} | {name: x if math.isfinite(x) else None for name, x in sorted(values.items())}
        self._file.write((json.dumps(self.last) + "\n").encode())
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flushes the file to disk, before a checkpoint that relies on its lines is written."""
        os.fsync(self._file.fileno())


def _tensorboard(directory: Path, after: int, console: Console) -> Any:
    # tensorboardX imports torch where it is installed, which costs a second and 180 MB and serves only torch tensors.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        console.print(
            f"  no TensorBoard without tensorboardX (extra `train`); {METRICS_FILE} has it all", highlight=False
        )
        return None
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(directory), purge_step=after + 1 if after else None)
