"""Reading and writing safetensors files as plain bytes.

A file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes in a
row (https://github.com/huggingface/safetensors). We parse it ourselves for two reasons: a damaged download
should give one sentence that lists everything wrong, and pruning should pass bytes through without a type in
between. Reading maps files into memory, so that a tensor's bytes are touched when it is used.

Left out: every other container (pickled .bin files).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from puzzle_jax.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
DTYPES: dict[str, Any] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class MappedFile:
    """A file whose bytes are mapped on first use, once for all of its tensors."""

    path: Path

    @cached_property
    def data(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its description, and where its bytes lie (offset from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: MappedFile
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """The tensor, as a read-only view of the file wherever its bytes are aligned."""
        dtype = DTYPES[self.dtype]
        if not self.nbytes:
            return np.empty(self.shape, dtype)
        data = np.asarray(self.file.data[self.offset : self.offset + self.nbytes])
        if self.offset % dtype.itemsize:
            data = data.copy()
        return data.view(dtype).reshape(self.shape)


class Opened(NamedTuple):
    """A checkpoint's files.

    Attributes:
      tensors: the readable tensors by name.
      problems: what is wrong with the files, one phrase each.
      lost: names that are absent from `tensors` for a reason that `problems` already gives; None: any name.
    """

    tensors: dict[str, StoredTensor]
    problems: list[str]
    lost: set[str] | None


def open_tensors(directory: Path) -> Opened:
    """Reads the headers of a checkpoint directory's files.

    Raises `CheckpointError` where there is nothing to read: no directory, or neither a file nor an index.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            raise CheckpointError(f"{directory} holds neither {SINGLE} nor {INDEX}")
        tensors, problem = _read_header(directory / SINGLE)
        return Opened(tensors, [problem] if problem else [], None if problem else set())
    opened = Opened({}, [], set())
    by_file: dict[str, list[str]] = {}
    for name, file in _read_weight_map(index).items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        tensors: dict[str, StoredTensor] = {}
        if Path(file).name != file or file in ("", ".", ".."):
            problem = f"{INDEX} names the file {file!r}, which is outside the directory"
        else:
            tensors, problem = _read_header(directory / file)
            absent = [name for name in names if name not in tensors]
            if absent and not problem:
                problem = f"{INDEX} says that {file} holds {absent[0]}, which it does not"
                problem += f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        if problem:
            opened.problems.append(problem)
        opened.tensors.update({name: tensors[name] for name in names if name in tensors})
        assert opened.lost is not None
        opened.lost.update(name for name in names if name not in tensors)
    return opened


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map, but must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{index} maps {name} to {file!r}, but must name a file")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` when it is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, but must hold an object")
    return data


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of one file; or no tensors, and a phrase that says why."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                return {}, f"{file.name} is cut short or no safetensors file ({size} bytes)"
            header = json.loads(stream.read(length))
    except OSError as error:
        return {}, f"{file.name} cannot be read ({error.strerror})"
    except ValueError:
        return {}, f"{file.name} has a damaged header"
    if not isinstance(header, dict):
        return {}, f"{file.name} has a damaged header"
    mapped = MappedFile(file)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, problem = _parse_entry(mapped, name, entry, data_start=8 + length, size=size)
        if tensor is None:
            return {}, problem
        tensors[name] = tensor
    return tensors, ""


def _parse_entry(
    file: MappedFile, name: str, entry: Any, *, data_start: int, size: int
) -> tuple[StoredTensor | None, str]:
    """One header entry; or None, and a phrase that says why."""
    where = file.path.name
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        if not all(type(number) is int and number >= 0 for number in numbers) or start > stop:
            raise ValueError
    except (KeyError, TypeError, ValueError):
        return None, f"{where} has a damaged entry for {name}"
    if dtype not in DTYPES:
        return None, f"{where} stores {name} as {dtype}, which is no known type"
    if stop - start != prod(shape) * DTYPES[dtype].itemsize:
        return None, f"{where} gives {name} {stop - start} bytes, which {dtype} {list(shape)} does not take"
    if data_start + stop > size:
        return None, f"{where} is cut short: it has {size} bytes, but {name} ends at {data_start + stop}"
    return StoredTensor(name, dtype, shape, file, data_start + start, stop - start), ""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written; `read` is called once, when its turn comes.

    `with_previous` keeps it in the file of the tensor before it (scales with their blocks).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    with_previous: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(directory: Path, plan: Sequence[PlannedTensor], *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes tensors in order: one model.safetensors, or shards of at most `shard_bytes` with an index.

    A tensor larger than that (with those tied to it) has a shard of its own.
    """
    shards = _split(plan, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / name, shard)
        weight_map.update({tensor.name: name for tensor in shard})
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in plan)}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(plan: Sequence[PlannedTensor], shard_bytes: int) -> list[list[PlannedTensor]]:
    units: list[list[PlannedTensor]] = []
    for tensor in plan:
        if tensor.with_previous:
            units[-1].append(tensor)
        else:
            units.append([tensor])
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for unit in units:
        size = sum(tensor.nbytes for tensor in unit)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += unit
        filled += size
    return shards


def _write_file(file: Path, tensors: Iterable[PlannedTensor]) -> None:
    # Wide types first, so that every tensor starts at a multiple of its element's size, as loaders want it.
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        stop = position + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = np.asarray(tensor.read(), order="C")
            if data.shape != tensor.shape or data.dtype != DTYPES[tensor.dtype]:
                found = f"{data.dtype} {list(data.shape)}"
                raise ValueError(f"{tensor.name} is {found}, planned as {tensor.dtype} {list(tensor.shape)}")
            stream.write(data.reshape(-1).view(np.uint8).data)
