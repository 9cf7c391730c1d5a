"""Reading safetensors files as plain bytes.

A file is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, and the tensors' bytes in a row
(https://github.com/huggingface/safetensors). We parse it ourselves for three reasons: a damaged download should give
one sentence that lists everything wrong, pruning should copy bytes without converting them, and a process
should read only the part of a tensor that its devices hold. Bytes are read into fresh arrays, not mapped, so that
memory holds what was requested and no more. Nothing here imports JAX.

Left out: all other containers (pickled .bin files).
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from puzzle_jax.convert_hf.other_forms import INDEX, SINGLE, check_form
from puzzle_jax.convert_hf.tensors.finite import all_finite
from puzzle_jax.errors import CheckpointError, shown
from puzzle_jax.files import Json, parse_json

DTYPES: dict[str, np.dtype] = {
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
NOT_A_NUMBER = 255
"""The one scale byte without a value: infinity in some decoders, NaN in others; refused wherever scales are read."""
CHUNK_BYTES = 16 << 20
"""Bytes that are read or written at a time."""
_CHECKED_BYTES = 512 << 10
_MAX_JSON = 16 << 20  # bytes; gpt-oss-120b needs 0.1 MB, and parsing takes up to thirty times the text's memory
_MAX_AXES = 8
_MAX_NAME = 500  # characters
_ALIGNMENT = 64
_SHORT_RUN = 4096  # bytes; reading less at a time is no faster than reading what lies between


@runtime_checkable
class Stored(Protocol):
    """A tensor whose values are in one file (`StoredTensor`), or in several tensors of files (`tensors.composed`).

    `nbytes` counts its bytes in the files, `chunks` and `bytes_at` give them, and `equals` compares them.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def sources(self) -> tuple[StoredTensor, ...]: ...
    def read(self, index: Sequence[slice] = (), *, weights: bool = False) -> np.ndarray: ...
    def equals(self, other: Stored) -> bool: ...
    def chunks(self, *, weights: bool = False) -> Iterator[np.ndarray]: ...
    def bytes_at(self, places: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its description, and where its bytes lie (offset from the start of the file)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def read(self, index: Sequence[slice] = (), *, weights: bool = False) -> np.ndarray:
        """The tensor, or a block of it, as a new array.

        Only the block's bytes are read, except that runs below 4 KB are read with the bytes between them.

        Args:
          index: a slice of step 1 for each of the first axes.
          weights: also raises `CheckpointError` where a value, or a scale of packed values, is not finite.

        Raises `CheckpointError` where the file can no longer be read.
        """
        dtype = DTYPES[self.dtype]
        bounds = bounds_of(index, self.shape)
        out = aligned([stop - start for start, stop in bounds], dtype)
        if not out.size:
            return out
        cut = [axis for axis, (size, now) in enumerate(zip(self.shape, out.shape, strict=True)) if size != now]
        last = cut[-1] if cut else 0
        strides = [prod(self.shape[axis + 1 :]) * dtype.itemsize for axis in range(len(self.shape))]
        with _opened(self.file) as file:
            if last and out.nbytes < _SHORT_RUN * prod(out.shape[:last]):
                rows = max(1, CHUNK_BYTES // strides[0])
                (first, stop), *inner = bounds
                for row in range(first, stop, rows):
                    count = min(rows, stop - row)
                    whole = np.empty((count, *self.shape[1:]), dtype)
                    _read_into(file, whole, self.offset + row * strides[0], self._check(whole) if weights else None)
                    out[row - first : row - first + count] = whole[(slice(None), *(slice(*pair) for pair in inner))]
                return out
            runs = out.reshape(prod(out.shape[:last]), -1)
            inside = bounds[last][0] * strides[last] if self.shape else 0
            check = self._check(out) if weights else None
            for run, outer in zip(runs, product(*(range(*pair) for pair in bounds[:last])), strict=True):
                start = sum(position * stride for position, stride in zip(outer, strides, strict=False))
                _read_into(file, run, self.offset + start + inside, check)
        return out

    def _check(self, array: np.ndarray) -> Callable[[int], None]:
        """A function that is called with the number of bytes read since its last call and checks those values.

        It checks `_CHECKED_BYTES` at a time, which the processor's cache still holds from reading.
        """
        values, size = array.reshape(-1), array.itemsize
        there = seen = 0

        def check(more: int) -> None:
            nonlocal there, seen
            there += more
            if there - seen < _CHECKED_BYTES and there < array.nbytes:
                return
            fresh = values[seen // size : there // size]
            if not all_finite(fresh):
                raise CheckpointError(f"{self.file}: {self.name} holds values that are not finite (NaN or infinity)")
            if self.name.endswith("_scales") and (fresh == NOT_A_NUMBER).any():
                raise CheckpointError(f"{self.file}: {self.name} holds the scale {NOT_A_NUMBER}, which is no number")
            seen = there - there % size

        return check

    def bytes_at(self, places: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Pieces of the tensor's bytes, each given by its first byte and its length."""
        with _opened(self.file) as file:
            for start, nbytes in places:
                piece = np.empty(nbytes, np.uint8)
                _read_into(file, piece, self.offset + start)
                yield piece

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """The tensors in files that hold its values."""
        return (self,)

    def equals(self, other: Stored) -> bool:
        """Tells whether both tensors have the same type, shape and bytes."""
        if not isinstance(other, StoredTensor) or (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        return all(np.array_equal(*pair) for pair in zip(self.chunks(), other.chunks(), strict=True))

    def chunks(self, *, weights: bool = False) -> Iterator[np.ndarray]:
        """The tensor's bytes in order, `CHUNK_BYTES` at a time; `weights` as in `read`."""
        with _opened(self.file) as file:
            for start in range(0, self.nbytes, CHUNK_BYTES):
                chunk = aligned([min(CHUNK_BYTES, self.nbytes - start)], np.dtype(np.uint8))
                check = self._check(chunk.view(DTYPES[self.dtype])) if weights else None
                _read_into(file, chunk, self.offset + start, check)
                yield chunk


def _opened(path: Path) -> io.BufferedReader:
    try:
        return _open(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _open(path: Path) -> io.BufferedReader:
    """Opens a regular file; raises OSError for anything else, such as a pipe, which would block until a writer came."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its path holds a null character")
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    return path.open("rb")


def bounds_of(index: Sequence[slice], shape: Sequence[int]) -> list[tuple[int, int]]:
    """First position and the one after the last, on every axis, of a block that `index` cuts out."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=False)]
    return bounds + [(0, size) for size in shape[len(bounds) :]]


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes, so that JAX takes it on a CPU without a copy."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_into(
    file: io.BufferedReader, array: np.ndarray, offset: int, check: Callable[[int], None] | None = None
) -> None:
    """Fills an array with bytes of a file; a system call may return fewer bytes than requested.

    Calls `check` with the number of bytes that each call returned, at most `_CHECKED_BYTES`.
    """
    view = array.reshape(-1).view(np.uint8).data
    while view:
        try:
            count = os.preadv(file.fileno(), [view if check is None else view[:_CHECKED_BYTES]], offset)
        except OSError as error:
            raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from None
        if not count:
            raise CheckpointError(f"{file.name} became shorter while it was read")
        if check is not None:
            check(count)
        view, offset = view[count:], offset + count


class Opened(NamedTuple):
    """A checkpoint's files.

    Attributes:
      tensors: the readable tensors by name.
      problems: what is wrong with the files, one phrase each.
      lost: names that are absent from `tensors` for a reason that `problems` already gives; None means any name.
    """

    tensors: dict[str, StoredTensor]
    problems: list[str]
    lost: set[str] | None


def open_tensors(directory: Path) -> Opened:
    """Reads the headers of a checkpoint directory's files.

    A single file takes precedence over an index, as in transformers: a checkpoint that was saved as shards first and as
    one file later still has the old index.

    Raises `CheckpointError` where there is nothing to read: no directory, or neither a file nor an index.
    """
    check_form(directory)
    if os.path.isfile(directory / SINGLE):
        tensors, problem = _read_header(directory / SINGLE)
        return Opened(tensors, [problem] if problem else [], None if problem else set())
    opened = Opened({}, [], set())
    by_file: dict[str, list[str]] = {}
    for name, file in _read_weight_map(directory / INDEX).items():
        by_file.setdefault(file, []).append(name)
    for file, names in sorted(by_file.items()):
        tensors: dict[str, StoredTensor] = {}
        if Path(file).name != file or file in ("", ".", "..") or not _is_name(file):
            problem = f"{INDEX} names the file {shown(file)}, which is outside the directory"
        else:
            tensors, problem = _read_header(directory / file)
            absent = [name for name in names if name not in tensors]
            if absent and not problem:
                problem = f"{INDEX} lists {absent[0]} in {file}, which does not hold it"
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
        if not _is_name(name):
            raise CheckpointError(f"{index} maps {shown(name)}, which is no tensor's name")
        if not isinstance(file, str):
            raise CheckpointError(f"{index} maps {name} to {shown(file)}, but must name a file")
    return weight_map


def _is_name(text: str) -> bool:
    """Returns whether a name from a file can be put into a message as it is."""
    return len(text) <= _MAX_NAME and text.isprintable()


def read_json(path: Path) -> dict[str, Json]:
    """A JSON object from a file; raises `CheckpointError` where it is missing or holds something else."""
    try:
        with _open(path) as file:
            text = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(text) > _MAX_JSON:
        raise CheckpointError(f"{path} is no such file: it has more than {_MAX_JSON} bytes")
    data = parse_json(text, str(path), CheckpointError, unique=True)
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a JSON {type(data).__name__}, but must hold an object")
    return data


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of one file; or no tensors, and a phrase that says why."""
    try:
        with _open(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_JSON, size - 8):
                return {}, f"{file.name} is cut short or no safetensors file ({size} bytes)"
            header = parse_json(stream.read(length), f"the header of {file.name}", CheckpointError, unique=True)
    except OSError as error:
        return {}, f"{file.name} cannot be read ({error.strerror})"
    except CheckpointError as error:
        return {}, str(error)
    if not isinstance(header, dict):
        return {}, f"the header of {file.name} is no JSON object"
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, problem = _parse_entry(file, name, entry, data_start=8 + length, size=size)
        if tensor is None:
            return {}, problem
        tensors[name] = tensor
    for before, after in pairwise(sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes))):
        if before.offset + before.nbytes > after.offset:
            return {}, f"{file.name} gives {before.name} and {after.name} the same bytes"
    return tensors, ""


def _parse_entry(file: Path, name: str, entry: Json, *, data_start: int, size: int) -> tuple[StoredTensor | None, str]:
    """One header entry; or None, and a phrase that says why."""
    where = file.name
    if not _is_name(name):
        return None, f"{where} has a damaged entry for {shown(name)}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        if not isinstance(dtype, str) or len(shape) > _MAX_AXES or start > stop:
            raise ValueError
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        return None, f"{where} has a damaged entry for {name}"
    if dtype not in DTYPES:
        return None, f"{where} stores {name} as {shown(dtype)}, which is no known type"
    if stop - start != prod(shape) * DTYPES[dtype].itemsize:
        return None, f"{where} gives {name} {stop - start} bytes, which {dtype} {list(shape)} does not take"
    if data_start + stop > size:
        return None, f"{where} is cut short: it has {size} bytes, but {name} ends at {data_start + stop}"
    return StoredTensor(name, dtype, shape, file, data_start + start, stop - start), ""
