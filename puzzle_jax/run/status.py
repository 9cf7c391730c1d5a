"""`puzzle status RUN`: stages that are done and what they took, the one under way, and what comes next.

It only reads files, so it can be called from anywhere while a run is in progress. Stages that are done are not checked
against changed settings; the next `puzzle run` does that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import PuzzleError, check_range
from puzzle_jax.files import Json, read_yaml
from puzzle_jax.run.places import CHILD, SETTINGS_FILE, STAGES
from puzzle_jax.runs import METRICS_FILE, read_metrics
from puzzle_jax.search.hours.left import spoken
from puzzle_jax.stages import KEPT, STAGE_FILE, read_stage_record

DONE, UNDER_WAY, TO_COME = "done", "under way", "to come"


@dataclass(frozen=True)
class StatusSettings:
    """One look at a run.

    Attributes:
      run: directory of the run.
      price_per_gpu_hour: price of an hour of one device, in any currency.
      json: whether to print JSON instead of a table.
    """

    run: Path
    price_per_gpu_hour: float | None = None
    json: bool = False

    def __post_init__(self) -> None:
        if self.price_per_gpu_hour is not None:
            check_range("price_per_gpu_hour", self.price_per_gpu_hour, 0)


@dataclass(frozen=True)
class StageStatus:
    """How far a stage has come.

    Attributes:
      state: one of `DONE`, `UNDER_WAY` and `TO_COME`.
      seconds: time that it took; None until it is done.
      devices: number of devices that it works on.
      note: how far it has come while under way.
    """

    name: str
    state: str
    seconds: float | None
    devices: int
    note: str = ""


def run(settings: StatusSettings) -> None:
    """Prints how far the run has come. Raises PuzzleError for a directory that holds no run."""
    found = list(stage_states(settings.run))
    following = next((stage.name for stage in found if stage.state != DONE), None)
    if settings.json:
        print(json.dumps({"stages": [asdict(stage) for stage in found], "next": following}, indent=1))
        return
    price = settings.price_per_gpu_hour
    table = Table("stage", "", "time", "device hours", *([] if price is None else ["price"]), "")
    for stage in found:
        hours = None if stage.seconds is None else stage.seconds * stage.devices / 3600
        cells = ["" if hours is None else f"{hours:.2f}"]
        if price is not None:
            cells.append("" if hours is None else f"{hours * price:,.2f}")
        took = "" if stage.seconds is None else spoken(stage.seconds)
        table.add_row(stage.name, stage.state, took, *cells, stage.note)
    console = plain_console()
    console.print(table)
    done = f"the child to serve is {settings.run / CHILD}" if following is None else f"next: {following}"
    console.print(done, highlight=False, soft_wrap=True)


def stage_states(run: Path) -> Iterator[StageStatus]:
    """Every stage of a run, in order. Raises PuzzleError where the directory holds no run."""
    path = run / SETTINGS_FILE
    if not path.is_file():
        raise PuzzleError(f"{run} is no run: it holds no {SETTINGS_FILE}, which `puzzle run` writes")
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise PuzzleError(f"{path} holds no settings of a run")
    for name in STAGES:
        if name == "control" and not settings.get("control", True):
            continue
        devices = _devices(settings.get("accuracy" if name == "control" else name))
        yield _search(run, devices) if name == "search" else _stage(run, name, settings, devices)


def _stage(run: Path, name: str, settings: Mapping[str, Json], devices: int) -> StageStatus:
    directory = run / (CHILD if name == "export" else name)
    record = read_stage_record(directory)
    if record is not None:
        return StageStatus(name, DONE, record.seconds, devices)
    kept = sorted(run.glob(f".{directory.name}{KEPT}*"), key=lambda path: path.stat().st_mtime)
    if not kept:
        return StageStatus(name, TO_COME, None, devices)
    return StageStatus(name, UNDER_WAY, None, devices, _progress(kept[-1], name, settings))


def _progress(kept: Path, name: str, settings: Mapping[str, Json]) -> str:
    """How far training has come, by its metrics."""
    metrics = kept / METRICS_FILE
    lines = read_metrics(metrics) if metrics.is_file() else []
    section = settings.get("accuracy" if name == "control" else name)
    steps = section.get("loop", {}).get("steps") if isinstance(section, dict) else None
    return f"step {lines[-1]['step']} of {steps}" if lines and steps else ""


def _search(run: Path, devices: int) -> StageStatus:
    """The status of the search, from its own stages."""
    found = [read_stage_record(path.parent) for path in (run / "search").glob(f"*/{STAGE_FILE}")]
    done = [record for record in found if record is not None]
    names = [str(record.content.get("name")) for record in done]
    if "report" in names:
        return StageStatus("search", DONE, sum(record.seconds for record in done), devices)
    return StageStatus("search", UNDER_WAY if done else TO_COME, None, devices, ", ".join(names))


def _devices(section: Json) -> int:
    """Devices of a section's mesh; 1 where it has none."""
    mesh = section.get("mesh", {}) if isinstance(section, dict) else {}
    sizes = [mesh.get(axis, 1) for axis in ("data", "sequence", "model")] if isinstance(mesh, dict) else []
    return math.prod(size for size in sizes if isinstance(size, int))
