"""Run directories: one run each, one process at a time.

    RUN/run.json    marks the directory as a run, and identifies it

Searches keep their stages in them (`stages`), training its checkpoints (`train.loop`). A directory that holds
anything else, or another run, is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.files import PARTIAL, Json, read_bytes, read_object, write_beside

Metrics = dict[str, Json]
"""A line of metrics.jsonl: {"step": number, NAME: number or null}."""

RUN_FILE, METRICS_FILE, REPORT_FILE = "run.json", "metrics.jsonl", "report.html"


def open_run(run_dir: Path, identity: Mapping[str, Json], marker: str = RUN_FILE, **more: Json) -> Path:
    """Creates a run directory, with its parents, or opens one that belongs to the same run.

    `identity` holds what identifies the run, such as the parent's path and fingerprint. `marker` is the file that marks
    the directory; a new one records `more` as well.

    Raises `PuzzleError`, before anything is written, if the directory holds something else.
    """
    run_dir, identity = Path(run_dir), json.loads(canonical(identity))
    if run_dir.exists() and not run_dir.is_dir():
        raise PuzzleError(f"{run_dir} is a file, but must be a directory for the run")
    record = run_dir / marker
    if record.exists():
        held = read_object(record).get("identity")
        if held != identity:
            raise PuzzleError(
                f"{run_dir} holds another run ({difference(held, identity)}); "
                "name another directory, or remove this one if it is no longer needed"
            )
        return run_dir
    if run_dir.exists():
        ours = f".{marker}{PARTIAL}"  # left by a process that was killed here
        names = sorted(entry.name for entry in run_dir.iterdir() if not entry.name.startswith(ours))
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise PuzzleError(f"{run_dir} holds files that are no run's ({shown}); name an empty or new directory")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(record, {"identity": identity, "puzzle_jax": version("puzzle_jax"), **more})
    except OSError as error:
        raise PuzzleError(f"{run_dir} cannot be written: {error.strerror}") from error
    return run_dir


def begun_on(out: Path) -> datetime.datetime | None:
    """The day on which the run in `out` began, which its chat templates see as today; None where there is no run."""
    marker = out / RUN_FILE
    if not marker.is_file():
        return None
    identity = read_object(marker).get("identity")
    try:
        return datetime.datetime.fromisoformat(identity["today"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None  # another kind of run, which will be refused as such


def read_metrics(path: Path) -> list[Metrics]:
    """The lines of a metrics.jsonl, {"step": number, NAME: number or null}, without an incomplete last one.

    Raises PuzzleError, naming file and line, for a file that cannot be read and a line of any other form.
    """
    lines = read_bytes(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        del lines[-1]
    return [_metrics_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _metrics_line(line: bytes, where: str) -> Metrics:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    step = values.get("step") if isinstance(values, dict) else None
    if not isinstance(values, dict) or type(step) is not int or not 0 <= step < 2**53:
        raise PuzzleError(f"{where} is no object with a step; repair it or move the file away")
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PuzzleError(f"{where}: {shown(name)} is {shown(value)}, but must be a number or null")
    return values


@contextlib.contextmanager
def locked(run_dir: Path, marker: str = RUN_FILE) -> Iterator[None]:
    """Locks the run directory; the system releases the lock when the process ends, however it ends."""
    with open(run_dir / marker) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PuzzleError(f"another process works in {run_dir}; wait for it or stop it") from error
        yield


def differences(old: Json, new: Json, path: str = "") -> Iterator[tuple[str, Json, Json]]:
    """Places in which two JSON values differ: dotted name and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield path, old, new


def difference(old: Json, new: Json) -> str:
    """The first few places in which two JSON values differ, in words; for inputs, only their names."""
    found = list(differences(old, new))
    parts = [
        path.removeprefix("inputs.") if path.startswith("inputs.") else f"{path} {_brief(one)} -> {_brief(other)}"
        for path, one, other in found[:3]
    ]
    return "; ".join(parts) + ("; ..." if len(found) > 3 else "")


def _brief(value: Json) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def canonical(value: Json) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def write_json(path: Path, value: Json) -> None:
    write_beside(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def version(package: str) -> str:
    try:
        return metadata.version(package.replace("_", "-"))
    except metadata.PackageNotFoundError:
        return "unknown"
