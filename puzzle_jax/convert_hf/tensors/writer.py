"""Writing safetensors files: planned shards, one piece of a tensor in memory at a time, verified, resumable.

The files of a checkpoint are written to a hidden directory beside the target, which is renamed when all of them are
complete; config.json comes last, so that the files of a killed run load nowhere. A journal beside that directory
records every finished shard with its SHA-256, and a run with the same identity (the same plan, sources and settings)
resumes after the last of them. Every shard is read back from the disk and its hash compared before it counts as
finished.

Left out: writing by several processes; one host writes a checkpoint.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from puzzle_jax.convert_hf.tensors.files import CHUNK_BYTES, DTYPES, INDEX, SINGLE
from puzzle_jax.errors import CheckpointError, PuzzleError, shown
from puzzle_jax.files import PARTIAL, Json, read_object, write_beside

SHARD_BYTES = 5_000_000_000
CONFIG = "config.json"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
      pieces: returns the tensor in pieces along its first axis, or as bytes; called when it is to be written.
      with_previous: keeps it in the file of the tensor before it (scales with their blocks).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]
    with_previous: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be written.

    Attributes:
      tensors: in order.
      files: the other files by name, config.json among them.
      identity: distinguishes this plan from others with the same tensors, so that a killed run can resume; None where
        sources cannot be distinguished, and a run starts over.
      shard_bytes: largest size of one safetensors file; a larger tensor (with those tied to it) has a file of its own.
    """

    tensors: Sequence[PlannedTensor]
    files: Mapping[str, bytes]
    identity: Json = None
    shard_bytes: int = SHARD_BYTES

    @property
    def shards(self) -> dict[str, list[PlannedTensor]]:
        """Tensors by file name."""
        units: list[list[PlannedTensor]] = []
        for tensor in self.tensors:
            if tensor.with_previous:
                units[-1].append(tensor)
            else:
                units.append([tensor])
        shards: list[list[PlannedTensor]] = [[]]
        filled = 0
        for unit in units:
            size = sum(tensor.nbytes for tensor in unit)
            if shards[-1] and filled + size > self.shard_bytes:
                shards.append([])
                filled = 0
            shards[-1] += unit
            filled += size
        if len(shards) == 1:
            return {SINGLE: shards[0]}
        return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, start=1)}

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines what is written, as far as `identity` covers it."""
        tensors = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]
        files = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}
        text = json.dumps([self.identity, tensors, files, self.shard_bytes], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def write_checkpoint(out: Path, plan: Plan, *, replace: Callable[[], bool] = lambda: False) -> None:
    """Writes a checkpoint directory.

    Args:
      out: the directory to create; empty or absent unless it is to be replaced.
      replace: returns whether a directory that is at `out` in the end may be replaced; may raise.

    Raises `PuzzleError` where the disk has too little room or cannot be written, another process is writing to `out`,
    something else is there, or a shard reads back differently than it was written.
    """
    with naming_target(out):
        _write(out, plan, replace)


@contextmanager
def naming_target(out: Path) -> Iterator[None]:
    """Turns system errors that occur while `out` is written into a `PuzzleError` that names it."""
    try:
        if "\0" in str(out):
            raise OSError("its path holds a null character")
        yield
    except OSError as error:
        name = str(out) if str(out).isprintable() else shown(str(out))
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file stands where a directory is needed" if in_the_way else error.strerror or error
        raise PuzzleError(f"{name} cannot be written: {reason}") from error


def _write(out: Path, plan: Plan, replace: Callable[[], bool]) -> None:
    for name in plan.files:
        if name in plan.shards or name == INDEX or Path(name).name != name:
            raise PuzzleError(f"{name!r} is no name of a file beside the weights of {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    work, journal, old = (out.parent / f".{out.name}.{kind}" for kind in ("partial", "partial.json", "replaced"))
    with _locked(work, out):
        for half in out.parent.glob(glob.escape(f".{journal.name}{PARTIAL}") + "*"):
            half.unlink()
        if old.exists():  # a run was killed between its last two renames, or after them
            if out.exists():
                _remove(old)
            else:
                old.rename(out)
        done = _finished_shards(work, journal, plan)
        free, needed = shutil.disk_usage(work).free, plan.total_bytes - sum(size for size, _ in done.values())
        if needed > free:
            if not done:
                _remove(work)
                journal.unlink(missing_ok=True)
            raise PuzzleError(f"{out} needs {needed} bytes, but its disk has {free} left")
        try:
            for name, tensors in plan.shards.items():
                if name not in done:
                    done[name] = write_file(work / name, tensors)
                    write_beside(journal, json.dumps({"plan": plan.fingerprint, "shards": done}).encode())
            files = {**_index(plan), **plan.files}
            for name in sorted(files, key=lambda name: name == CONFIG):
                write_beside(work / name, files[name])
            _sync(work)
            if out.exists() and (any(out.iterdir()) or not out.is_dir()):
                if not replace():
                    raise PuzzleError(f"{out} holds something else by now")
                out.rename(old)
            work.rename(out)
        except BaseException as error:
            kept = plan.identity is not None and isinstance(error, (OSError, KeyboardInterrupt, SystemExit))
            if not kept:
                _remove(work)
                journal.unlink(missing_ok=True)
            if old.exists() and not out.exists():
                old.rename(out)
            raise
        journal.unlink(missing_ok=True)
        _remove(old)


def _remove(directory: Path) -> None:
    """Removes a checkpoint as far as the system allows, config.json first, so that what is left does not load."""
    with suppress(OSError):
        (directory / CONFIG).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Locks the hidden directory for this process; the system releases the lock when the process ends."""
    work.mkdir(exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PuzzleError(f"{out} is being written by another process") from None
        if not (work.exists() and os.path.samestat(os.fstat(descriptor), work.stat())):
            raise PuzzleError(f"{out} was written by another process just now")
        yield
    finally:
        os.close(descriptor)


def _finished_shards(work: Path, journal: Path, plan: Plan) -> dict[str, tuple[int, str]]:
    """Size and hash of the shards that an earlier run of the same plan finished; clears away everything else."""
    done: dict[str, tuple[int, str]] = {}
    with suppress(PuzzleError, AttributeError, KeyError, TypeError, ValueError, OverflowError):
        record = read_object(journal)
        if plan.identity is not None and record["plan"] == plan.fingerprint:
            done = {name: (int(size), str(digest)) for name, (size, digest) in record["shards"].items()}
    planned = plan.shards
    done = {name: entry for name, entry in done.items() if name in planned and _measured(work / name) == entry}
    for path in work.iterdir():
        if path.name not in done:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return done


def _measured(path: Path) -> tuple[int, str] | None:
    """Size and SHA-256 of a file, read from the disk, not from memory, where the system allows; None without a file."""
    if not path.is_file():
        return None
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def write_file(path: Path, tensors: Sequence[PlannedTensor]) -> tuple[int, str]:
    """Writes one file and reads it back; returns its size in bytes and its SHA-256.

    Raises ValueError where a tensor's type or size is not as planned, `CheckpointError` where the file reads back
    differently.
    """
    # Wide types first, so that every tensor starts at a multiple of its element's size, as loaders expect.
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    beside = path.with_name(f".{path.name}")
    digest, size = hashlib.sha256(), 0
    with beside.open("wb", buffering=0) as file:

        def write(data: bytes | memoryview) -> None:
            nonlocal size
            digest.update(data)
            view = memoryview(data)
            size += len(view)
            while view:
                view = view[file.write(view) :]

        write(_header(tensors))
        for tensor in tensors:
            written = size
            for piece in tensor.pieces():
                data = np.ascontiguousarray(piece)
                if data.dtype not in (DTYPES[tensor.dtype], np.uint8):
                    raise ValueError(f"{tensor.name} came as {data.dtype}, planned as {tensor.dtype}")
                write(data.reshape(-1).view(np.uint8).data)
            if size - written != tensor.nbytes:
                raise ValueError(f"{tensor.name} came as {size - written} bytes, planned as {tensor.nbytes}")
        os.fsync(file.fileno())
    if _measured(beside) != (size, digest.hexdigest()):
        raise CheckpointError(f"{path} reads back differently than it was written: the disk is failing or full")
    beside.replace(path)
    return size, digest.hexdigest()


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        stop = position + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(plan: Plan) -> dict[str, bytes]:
    """The index by its file name; none for a single file."""
    if len(plan.shards) == 1:
        return {}
    weight_map = {tensor.name: name for name, tensors in plan.shards.items() for tensor in tensors}
    index = {"metadata": {"total_size": plan.total_bytes}, "weight_map": weight_map}
    return {INDEX: (json.dumps(index, indent=2) + "\n").encode()}


def _sync(directory: Path) -> None:
    """Flushes the entries of a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
