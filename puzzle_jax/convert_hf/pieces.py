"""Parameters as pieces of their checkpoint tensors: expert matrices one by one, other arrays some rows at a time, each
in the table's type and orientation, and packed to MXFP4 where the table says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from puzzle_jax.convert_hf.table import ParamPath, TensorSpec
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import CHUNK_BYTES, NOT_A_NUMBER, Stored
from puzzle_jax.convert_hf.tensors.finite import all_finite
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.spec import EXPERT_MATRICES


def as_stored(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """An array in the table's type: bytes and BF16 unchanged, wider floats rounded to BF16."""
    return array if spec.dtype == "U8" else array.astype(ml_dtypes.bfloat16, copy=False)


def same_tensor(spec: TensorSpec, ours: Stored, theirs: Stored) -> bool:
    """Returns whether two tensors have the same bytes or, where their types differ, the same in the table's type."""
    if ours.dtype == theirs.dtype:
        return ours.equals(theirs)
    return same_bytes(as_stored(spec, ours.read()), as_stored(spec, theirs.read()))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Returns whether the bytes of two arrays are equal."""
    x, y = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return np.array_equal(x, y)


@runtime_checkable
class Rows(Protocol):
    """A NumPy or JAX array, or anything else that has a shape and returns arrays when it is sliced."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: slice, /) -> object: ...


Leaf = Rows | MXFP4


class Pieces:
    """Yields parameters as pieces of their tensors; keeps the scales of the last packed matrix until they are due, and
    the last expert matrix, of which files may hold several parts."""

    def __init__(self) -> None:
        self.scales: dict[ParamPath, list[np.ndarray]] = {}
        self.last: tuple[object, np.ndarray | None] = (None, None)

    def part(self, spec: TensorSpec, leaf: Leaf, expert: int, part: int) -> np.ndarray:
        """One matrix of one expert, [outputs, inputs], as files hold it that hold them one by one."""
        key, matrix = self.last
        if key != (spec.name, expert) or matrix is None:
            (matrix,) = next(self.of(spec, leaf, [expert]))
            self.last = (spec.name, expert), matrix
        return matrix[:, part :: len(spec.parts)].T

    def of(self, spec: TensorSpec, leaf: Leaf, experts: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """A tensor's pieces: expert matrices one by one; only those of `experts`, in that order, where given."""
        path = spec.parameter
        half = spec.path[-1] if path != spec.path else None
        if half == "scales" and path in self.scales:
            yield from self.scales.pop(path)
            return
        if path[-1] not in EXPERT_MATRICES:
            yield from _dense_pieces(spec, leaf, experts)
            return
        if half is None and experts is None:
            _check_shape(spec, leaf.shape)
        if half == "blocks":
            self.scales[path] = []
        for expert in range(leaf.shape[0]) if experts is None else experts:
            if isinstance(leaf, MXFP4):
                codes, scales = expert_of(leaf.codes, expert), expert_of(leaf.scales, expert)
                blocks = codes.reshape(*scales.shape, -1)
                if (scales == NOT_A_NUMBER).any():
                    raise PuzzleError(f"{spec.parameter_name} holds the scale {NOT_A_NUMBER}, which is no number")
                if half is None:
                    yield mxfp4.decode(blocks, scales, ml_dtypes.bfloat16)
                    continue
            elif half is None:
                yield as_stored(spec, _finite(spec, expert_of(leaf, expert)))
                continue
            else:
                try:
                    blocks, scales = mxfp4.encode(_finite(spec, expert_of(leaf, expert)))
                except PuzzleError as error:
                    raise PuzzleError(f"{spec.name.removesuffix('_blocks')}, expert {expert}: {error}") from None
            if half == "blocks":
                self.scales[path].append(scales)
            yield blocks if half == "blocks" else scales


def _dense_pieces(spec: TensorSpec, leaf: Leaf, experts: Sequence[int] | None) -> Iterator[np.ndarray]:
    """A parameter in the orientation and type of its tensor, some rows at a time."""
    array = np.asarray(leaf)
    array = array.T if spec.transposed else array
    array = array if experts is None else array[list(experts)]
    if experts is None:
        _check_shape(spec, array.shape)
    rows = max(1, CHUNK_BYTES * spec.shape[0] // spec.nbytes)
    for start in range(0, len(array), rows):
        yield as_stored(spec, _finite(spec, array[start : start + rows]))


def _finite(spec: TensorSpec, values: np.ndarray) -> np.ndarray:
    if not all_finite(values):
        raise PuzzleError(f"{spec.parameter_name} holds values that are not finite (NaN or infinity)")
    return values


def _check_shape(spec: TensorSpec, shape: Sequence[int]) -> None:
    if tuple(shape) != spec.shape:
        raise ConfigError(f"{spec.name} would have shape {list(shape)}, but the model needs {list(spec.shape)}")


def expert_of(leaf: Rows, expert: int) -> np.ndarray:
    """One expert, as a stack of one, from a stack that may be on devices."""
    return np.asarray(leaf[expert : expert + 1])
