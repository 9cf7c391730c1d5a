"""Stages that read and write files in one run directory and are rerun only when something has changed.

    RUN/run.json            marks the directory as a run, with its identity
    RUN/<stage>/...         the stage's outputs
    RUN/<stage>/stage.json  hash of its inputs and settings, versions, seconds, and the list of its outputs

A `Stage` names its inputs and produces its outputs; a pipeline is a tuple of stages. A stage writes into
a temporary directory beside its own, which is renamed when everything is written: a stage that dies leaves the earlier
state and never half a file. Intermediate results go into a second directory, which survives a killed process and is
found again when the stage runs with the same key (inputs, settings and version). A stage whose inputs, settings and
package version are unchanged is skipped. One process works in a run directory at a time. Files that a stage did not
write, or that were edited since, are neither overwritten nor deleted: later stages use an edited output as it is, and
its own stage refuses to run again.

Left out: several processes, one of which runs a stage here while the others join in its work (`search.copies`), and
progress inside a stage.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from puzzle_jax.codec import from_plain
from puzzle_jax.compiling import compile_seconds
from puzzle_jax.errors import PuzzleError, check_range, shown
from puzzle_jax.files import PARTIAL, naming, read_object
from puzzle_jax.runs import RUN_FILE, canonical, difference, locked, version, write_json

STAGE_FILE = "stage.json"
_REPLACED, KEPT = ".replaced-", ".kept-"
# Files above this size are identified by size, modification time, and their first and last megabyte.
_WHOLE_HASH_BYTES = 64 << 20


Context = TypeVar("Context")
"""The context that the stages of one pipeline share."""


@dataclass(frozen=True)
class Stage(Generic[Context]):
    """One stage of a pipeline.

    Attributes:
      name: name of the stage.
      inputs: files and directories that the outputs depend on, identified by content (`_file_digest`).
      settings: JSON values that the outputs depend on, including what is in no file (device kind, library versions).
      produce: writes the outputs into its second argument, an empty directory. The third is the directory of
        intermediate results, which exists if a killed run of the same stage with the same key made it, and which is
        removed once the stage is done.
      directory: directory of the outputs inside the run; the stage's name unless given.
      finish: runs after the stage, even where the stage was skipped.
    """

    name: str
    inputs: Callable[[Context], Iterable[Path]]
    settings: Callable[[Context], Mapping[str, object]]
    produce: Callable[[Context, Path, Path], None]
    directory: str = ""
    finish: Callable[[Context], None] | None = None

    def run(self, run_dir: Path, context: Context) -> StageResult:
        """Runs the stage unless its outputs exist and nothing that they depend on has changed.

        Raises:
          PuzzleError: the directory is not a run's, an input is missing, another process is working in it, or the
            stage's directory holds files that the stage did not write.
        """
        result = self._run(run_dir, context)
        if self.finish is not None:
            self.finish(context)
        return result

    def _run(self, run_dir: Path, context: Context) -> StageResult:
        if not (run_dir / RUN_FILE).is_file():
            raise PuzzleError(f"{run_dir} is no run directory: it holds no {RUN_FILE}")
        final = run_dir / (self.directory or self.name)
        with locked(run_dir):
            _clear_leftovers(final)
            wanted = {
                "name": self.name,
                "settings": json.loads(canonical(self.settings(context))),
                "inputs": {_shown(path, run_dir): _digest(path, self.name) for path in self.inputs(context)},
                "puzzle_jax": version("puzzle_jax"),
            }
            key = hashlib.sha256(canonical(wanted).encode()).hexdigest()
            record = read_stage_record(final)
            reason = _reason_to_run(final, record, wanted, key)
            if not reason:
                assert record is not None
                _drop_kept(final)
                return StageResult(self.name, final, key, record.seconds, True, "", record.compile_seconds)
            _refuse_foreign(final, record, self.name)
            unfinished = final.with_name(f".{final.name}{PARTIAL}{os.getpid()}")
            kept = final.with_name(f".{final.name}{KEPT}{_short_hash(key, version('jax'))}")
            start, compiled = time.perf_counter(), compile_seconds()
            try:
                with naming(final):
                    unfinished.mkdir()
                    self.produce(context, unfinished, kept)
                seconds, compiling = time.perf_counter() - start, compile_seconds() - compiled
                outputs = {path: _file_digest(unfinished / path) for path in _files(unfinished)}
                took = {"seconds": seconds, "compile_seconds": compiling}
                written = {"key": key, **wanted, "jax": version("jax"), **took, "outputs": outputs}
                write_json(unfinished / STAGE_FILE, written)
                _publish(unfinished, final)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            _drop_kept(final)
        return StageResult(self.name, final, key, seconds, False, reason, compiling)


@dataclass(frozen=True)
class StageResult:
    """The result of running a stage.

    Attributes:
      name: name of the stage.
      directory: directory of its outputs.
      key: hash of inputs, settings and package version.
      seconds: time that it took to produce the outputs.
      skipped: whether an earlier result was up to date.
      reason: why it ran, in a few words; empty if skipped.
      compile_seconds: the part of `seconds` spent on tracing and compiling.
    """

    name: str
    directory: Path
    key: str
    seconds: float
    skipped: bool
    reason: str
    compile_seconds: float = 0.0


def _publish(unfinished: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}{_REPLACED}{os.getpid()}")
    if final.exists():
        final.rename(replaced)
    try:
        unfinished.rename(final)
    except BaseException:
        if replaced.exists():
            replaced.rename(final)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_leftovers(final: Path) -> None:
    """Removes what a killed process left behind; an old result that was already moved aside is moved back."""
    for path in final.parent.glob(f".{final.name}{_REPLACED}*"):
        if final.exists():
            _remove(path)
        else:
            path.rename(final)
    for path in final.parent.glob(f".{final.name}{PARTIAL}*"):
        _remove(path)


def _drop_kept(final: Path) -> None:
    """Removes the intermediate results of a stage that is done."""
    for path in final.parent.glob(f".{final.name}{KEPT}*"):
        shutil.rmtree(path, ignore_errors=True)


def _short_hash(*parts: str) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _remove(path: Path) -> None:
    """Removes a file, a link (never what it points to) or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _reason_to_run(final: Path, record: StageRecord | None, wanted: Mapping[str, object], key: str) -> str:
    if record is None:
        return "not run yet"
    missing = [path for path in record.outputs if not (final / path).is_file()]
    if missing:
        return f"{missing[0]} is gone"
    if record.key == key:
        return ""
    changed = difference({k: record.content.get(k) for k in wanted}, wanted)
    return f"changed: {changed}"


def edited_output(run_dir: Path) -> Path | None:
    """A file in a run that was changed after its stage wrote it, or None."""
    for directory in sorted(path for path in Path(run_dir).iterdir() if path.is_dir()):
        record = read_stage_record(directory)
        for name, digest in record.outputs.items() if record is not None else ():
            if (directory / name).is_file() and _file_digest(directory / name) != digest:
                return directory / name
    return None


def _refuse_foreign(final: Path, record: StageRecord | None, name: str) -> None:
    """Raises PuzzleError where the stage would overwrite anything that it did not write itself."""
    if final.is_symlink():
        raise PuzzleError(
            f"{final} is a symbolic link, but stage {name!r} replaces its directory as a whole; move what it points to "
            "into its place, or remove the link"
        )
    if not final.exists():
        return
    if not final.is_dir():
        raise PuzzleError(f"{final} is a file, but must be the directory of stage {name!r}; move it away")
    outputs = {} if record is None else record.outputs
    for path in _files(final):
        if path == STAGE_FILE and record is not None:
            continue
        if path not in outputs:
            raise PuzzleError(f"{final / path} was not written by stage {name!r}; move it out of {final} first")
        if _file_digest(final / path) != outputs[path]:
            raise PuzzleError(
                f"{final / path} was changed after stage {name!r} wrote it; move it away to run the stage again"
            )


def _digest(path: Path, stage: str) -> str | dict[str, str]:
    """The content of an input: a hash, or for a directory one hash per file without the records of stages."""
    if path.is_file():
        return _file_digest(path)
    if path.is_dir():
        return {name: _file_digest(path / name) for name in _files(path) if Path(name).name != STAGE_FILE}
    raise PuzzleError(f"stage {stage!r} needs {path}, which does not exist; run the stage that writes it first")


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _WHOLE_HASH_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{size} {path.stat().st_mtime_ns}".encode())
        digest.update(file.read(1 << 20))
        file.seek(-(1 << 20), os.SEEK_END)
        digest.update(file.read())
    return digest.hexdigest()


def _files(directory: Path) -> list[str]:
    """Relative paths of the files below a directory, sorted, with forward slashes."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())


def _shown(path: Path, run_dir: Path) -> str:
    """The name of an input in a record: relative to the run where it lies inside, so that a run can be moved."""
    path, run_dir = path.resolve(), run_dir.resolve()
    return path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else str(path)


# The record that a stage leaves beside its outputs is checked in full: people copy, edit and prune run directories.


@dataclass(frozen=True)
class StageRecord:
    """The content of stage.json.

    Attributes:
      key: hash of inputs, settings and package version.
      seconds: time that it took to produce the outputs.
      compile_seconds: the part of `seconds` spent on tracing and compiling.
      outputs: digest of every file, by its path below the stage's directory.
      jax: version of JAX.
      content: the whole object.
    """

    key: str
    seconds: float
    outputs: dict[str, str]
    jax: str = "unknown"
    compile_seconds: float = 0.0
    content: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("seconds", "compile_seconds"):
            check_range(name, getattr(self, name), 0, 1e12)
        for name in self.outputs:
            path = PurePosixPath(name)
            if not name or "\0" in name or path.is_absolute() or ".." in path.parts:
                raise PuzzleError(f"outputs has {shown(name)}, but must be digests by paths below the directory")


def read_stage_record(directory: Path) -> StageRecord | None:
    """The record in a stage's directory; None where there is none.

    Raises `PuzzleError`, naming file and field, for a record that no stage can have written.
    """
    path = directory / STAGE_FILE
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        return from_plain(StageRecord, {**content, "content": content}, str(path))
    except PuzzleError as error:
        raise PuzzleError(f"{error}; move {directory} away to run the stage again") from None
