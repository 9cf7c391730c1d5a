"""Tensors that are computed from several tensors in files, read a block at a time like those that are not.

A `ScaledTensor` is a matrix in FP8: e4m3 codes and one scale for each block of 128 x 128 (those at the right and lower
edges may be smaller). Its values are code times scale in float32, exact up to that rounding (the form of DeepSeek-V3,
arXiv 2412.19437, section 3.3). `StackedExperts` are the matrices of a layer's experts as one array [experts, inputs,
outputs], whose columns are the rows of the matrices in the files; an expert's gate and up projection alternate in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import ml_dtypes
import numpy as np

from puzzle_jax.convert_hf.table import BLOCK
from puzzle_jax.convert_hf.tensors.files import DTYPES, Stored, StoredTensor, aligned, bounds_of
from puzzle_jax.convert_hf.tensors.finite import all_finite
from puzzle_jax.errors import CheckpointError

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
"""The values of all codes of e4m3."""


class Composed:
    """Base of tensors whose bytes are those of their `sources`, one after the other."""

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def equals(self, other: Stored) -> bool:
        """Tells whether both have the same shape, and sources of the same types, shapes and bytes."""
        if self.shape != other.shape or len(self.sources) != len(other.sources):
            return False
        return all(ours.equals(theirs) for ours, theirs in zip(self.sources, other.sources, strict=True))

    def chunks(self, *, weights: bool = False) -> Iterator[np.ndarray]:
        """The bytes in order, as `StoredTensor.chunks` gives them."""
        for source in self.sources:
            yield from source.chunks(weights=weights)

    def bytes_at(self, places: Iterable[tuple[int, int]]) -> Iterator[np.ndarray]:
        """Pieces of the bytes, each given by its first byte and its length."""
        sources = self.sources
        for start, nbytes in places:
            pieces = []
            first = int(np.searchsorted(self._starts, start, side="right")) - 1
            for source, (begin, end) in zip(sources[first:], pairwise(self._starts[first:]), strict=True):
                if begin >= start + nbytes:
                    break
                low, high = max(start, begin), min(start + nbytes, end)
                pieces += source.bytes_at([(low - begin, high - low)])
            yield np.concatenate(pieces)

    @cached_property
    def _starts(self) -> list[int]:
        """Where each source begins, and where the last one ends."""
        return list(accumulate((source.nbytes for source in self.sources), initial=0))


@dataclass(frozen=True)
class ScaledTensor(Composed):
    """A matrix in FP8, [rows, columns].

    Attributes:
      codes: its e4m3 codes.
      scales: one number for each block.
      dtype: the type that its values are rounded to, "F32" or "BF16".
    """

    codes: StoredTensor
    scales: StoredTensor
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return self.codes.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        return self.codes, self.scales

    def rounded(self) -> ScaledTensor:
        """The same with values in BF16."""
        return replace(self, dtype="BF16")

    def read(self, index: Sequence[slice] = (), *, weights: bool = False) -> np.ndarray:
        """The values of a block; arguments and errors as those of `StoredTensor.read`."""
        bounds = bounds_of(index, self.shape)
        (first, _), (left, right) = bounds
        codes = self.codes.read([slice(*pair) for pair in bounds], weights=weights).view(np.uint8)
        blocks = [slice(start // BLOCK, -(-stop // BLOCK)) for start, stop in bounds]
        scales = self.scales.read(blocks, weights=weights).astype(np.float32)
        out = np.empty(codes.shape, DTYPES[self.dtype])
        for number, row in enumerate(scales[:, np.arange(left, right) // BLOCK - left // BLOCK], first // BLOCK):
            part = slice(max(number * BLOCK - first, 0), (number + 1) * BLOCK - first)
            values = _VALUES[codes[part]]
            with np.errstate(over="ignore"):
                values *= row
            if weights and not all_finite(values):
                rule = "times its scales holds values that are not finite"
                raise CheckpointError(f"{self.codes.file}: {self.name} {rule}")
            out[part] = values
        return out


@dataclass(frozen=True)
class StackedExperts(Composed):
    """Matrices of a layer's experts, [experts, inputs, outputs].

    Attributes:
      name: the name that stands for all of them.
      matrices: for each expert those that make it up, [outputs, inputs] each, all of one type and shape.
      fused: whether they are pieces of one tensor in the files, [experts, outputs, inputs].
    """

    name: str
    matrices: tuple[tuple[StoredTensor | ScaledTensor, ...], ...]
    fused: bool = False

    @property
    def dtype(self) -> str:
        return self.matrices[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.matrices[0][0].shape
        return len(self.matrices), columns, rows * len(self.matrices[0])

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        return self._all

    @cached_property
    def _all(self) -> tuple[StoredTensor, ...]:
        return tuple(source for parts in self.matrices for matrix in parts for source in matrix.sources)

    def rounded(self) -> StackedExperts:
        """The same with values of FP8 in BF16."""
        if not isinstance(self.matrices[0][0], ScaledTensor):
            return self
        one = tuple(tuple(m.rounded() for m in parts if isinstance(m, ScaledTensor)) for parts in self.matrices)
        return replace(self, matrices=one)

    def read(self, index: Sequence[slice] = (), *, weights: bool = False) -> np.ndarray:
        """A block, of which only the bytes are read; arguments and errors as those of `StoredTensor.read`."""
        experts, inputs, outputs = bounds_of(index, self.shape)
        out = aligned([stop - start for start, stop in (experts, inputs, outputs)], DTYPES[self.dtype])

        def fill(row: int) -> None:
            parts = self.matrices[experts[0] + row]
            for place, matrix in enumerate(parts):
                first, last = (-(-(bound - place) // len(parts)) for bound in outputs)
                rows = matrix.read((slice(first, last), slice(*inputs)), weights=weights)
                out[row, :, place + first * len(parts) - outputs[0] :: len(parts)] = rows.T

        if len(out) == 1:
            fill(0)
        else:  # transposing takes longer than reading, and neither holds the interpreter's lock
            with ThreadPoolExecutor() as pool:
                list(pool.map(fill, range(len(out))))
        return out


def slices_of(tensor: StoredTensor, shape: tuple[int, ...], count: int) -> list[StoredTensor]:
    """The `count` equal tensors of this shape that lie one after the other in a tensor's bytes."""
    nbytes = tensor.nbytes // count
    return [replace(tensor, shape=shape, nbytes=nbytes, offset=tensor.offset + i * nbytes) for i in range(count)]
