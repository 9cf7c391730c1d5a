"""Reads the rows of trace files as plain values, of which `traces` makes traces.

JSONL is read line by line, parquet a few rows at a time, so that memory is proportional to what the file holds. A
parquet file that holds far more than its size can justify is refused before it is unpacked. Arrays in rows have the
format of .npy files; their header is checked against the number of bytes before an array is made.
"""

from __future__ import annotations

import base64
import codecs
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.files import parse_json

_ROWS_AT_ONCE = 64
# Most values and unpacked bytes of a parquet file: per byte of its size, and what is allowed for any size.
_VALUES, _BYTES = (100, 1 << 24), (1000, 1 << 28)


def jsonl_rows(path: Path, torn_tail: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place and the object of every line of a JSONL file that is not blank.

    With `torn_tail`, a last line without a newline, which a killed run leaves, is ignored. Raises `PuzzleError` if the
    file cannot be read, or a line is not a JSON object of valid Unicode.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if torn_tail and not line.endswith(b"\n"):
                    return
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # Some editors begin a file with it.
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                row = parse_json(line, where)
                if not isinstance(row, dict):
                    raise PuzzleError(f"{where} holds {type(row).__name__}, but must hold an object")
                yield where, row
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise PuzzleError(f"{path!s} cannot be read as a JSONL file of traces: {why}") from None


def parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of every row of a parquet file, and its values of those `columns` that the file has.

    Raises:
      PuzzleError: the file cannot be read, has none of the columns, or one twice, or holds absurdly many values.
    """

    def refuse(error: Exception) -> NoReturn:
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise PuzzleError(f"{path!s} cannot be read as a parquet file of traces: {why}") from None

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
    except Exception as error:  # Damage shows as nearly any exception of Python's or of Arrow's.
        refuse(error)
    with file:
        wanted = [name for name in columns if name in names]
        if not wanted:
            raise PuzzleError(f"{path} has the columns {shown(names)}, but none of a file of traces")
        twice = next((name for name in wanted if names.count(name) > 1), None)
        if twice is not None:
            raise PuzzleError(f"{path} has two columns {twice}, but every column must have a name of its own")
        number = 0
        try:
            _check_size(path, file.metadata, wanted)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                for row in _rows(batch, f"{path}, row", number):
                    number += 1
                    yield f"{path}, row {number}", row
        except PuzzleError:
            raise
        except Exception as error:
            refuse(error)


def array_bytes(array: np.ndarray) -> bytes:
    """An array in the format of .npy files, which includes shape and dtype."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_array(value: Any, name: str) -> np.ndarray:
    """The array that `array_bytes` wrote, from its bytes or their base64.

    Raises:
      PuzzleError: it is no such array, its dtype is neither uint8 nor uint16, or its size is not what its header says.
    """
    try:
        data = value if isinstance(value, bytes) else base64.b64decode(value, validate=True)
        file = io.BytesIO(data)
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read_header[version](file)
    except Exception as error:  # The header is a Python literal, whose damage shows as nearly any exception.
        why = " ".join(str(error).split())[:200]
        raise PuzzleError(f"{name} is no array in the form of .npy files: {type(error).__name__}: {why}") from None
    if dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise PuzzleError(f"{name} has type {str(dtype)[:100]}, but must have type uint8 or uint16")
    left = len(data) - file.tell()
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != left:
        raise PuzzleError(f"{name} says that it has shape {shown(shape)}, but {left} bytes of it are there")
    flat = np.frombuffer(data, dtype, offset=file.tell()).astype(dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")


def _check_size(path: Path, metadata: pq.FileMetaData, wanted: Sequence[str]) -> None:
    size = path.stat().st_size
    values = bytes_ = 0
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema.partition(".")[0] in wanted:
                values += column.num_values
                bytes_ += column.total_uncompressed_size
    if any(held > max(per_byte * size, least) for held, (per_byte, least) in ((values, _VALUES), (bytes_, _BYTES))):
        raise PuzzleError(
            f"{path} holds {values} values in {bytes_} bytes, packed into {size}, which no file of traces can need"
        )


def _rows(batch: pa.RecordBatch, where: str, before: int) -> Iterator[dict[str, Any]]:
    try:
        yield from batch.to_pylist()
        return
    except Exception:  # Text that is not UTF-8, for example: find out in which row and column.
        pass
    for index in range(batch.num_rows):
        row = {}
        for name in batch.schema.names:
            try:
                row[name] = batch.column(name)[index].as_py()
            except Exception as error:
                why = " ".join(str(error).split())[:200]
                raise PuzzleError(f"{where} {before + index + 1}: {name} cannot be read: {why}") from None
        yield row
