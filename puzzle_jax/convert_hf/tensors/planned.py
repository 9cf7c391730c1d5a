"""The tensors that an export writes for one of the table: copies of the parent's bytes, or trained values.

A tensor that files hold in parts is written in the form that the parent has: expert by expert, or fused. Matrices in
FP8 are copied with their scales; trained ones are written in BF16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from puzzle_jax.convert_hf.pieces import Leaf, Pieces, as_stored
from puzzle_jax.convert_hf.table import TensorSpec
from puzzle_jax.convert_hf.tensors.composed import ScaledTensor, StackedExperts
from puzzle_jax.convert_hf.tensors.files import Stored, StoredTensor
from puzzle_jax.convert_hf.tensors.writer import PlannedTensor

NEVER = -1e30
"""The router bias of an expert that is only there to fill a shape."""

_Pieces = Callable[[], Iterable[np.ndarray]]


def copied(spec: TensorSpec, stored: Stored, ids: Sequence[int] | None) -> list[PlannedTensor]:
    """A tensor of a child with its parent's values.

    Args:
      spec: the tensor in the child.
      stored: the same in the parent.
      ids: the experts that are kept, where it has one row for each.
    """
    if isinstance(stored, StackedExperts):
        kept = [stored.matrices[expert] for expert in (range(len(stored.matrices)) if ids is None else ids)]
        if stored.fused:
            pieces = (partial(_copy, spec, matrix) for parts in kept for matrix in parts)
            return [_fused(spec, pieces)]
        return [
            planned
            for row, parts in enumerate(kept)
            for part, matrix in enumerate(parts)
            for planned in _matrix(spec, spec.file_name(row, part), matrix)
        ]
    if ids is not None:
        return [_planned(spec, partial(_filled, spec, partial(_rows, spec, stored, ids), len(ids)))]
    return _matrix(spec, spec.name, stored)


def made(
    spec: TensorSpec, pieces: Pieces, leaf: Callable[[], Leaf], ids: Sequence[int] | None, *, fused: bool = False
) -> list[PlannedTensor]:
    """A tensor of given values.

    Args:
      spec: the tensor.
      pieces: makes the pieces of all tensors of a checkpoint.
      leaf: returns the parameter.
      ids: the experts that are taken, where it has one row for each; None takes all.
      fused: whether all experts of a layer are one tensor in the files.
    """

    def whole() -> Iterator[np.ndarray]:
        return pieces.of(spec, leaf(), ids)

    if not spec.parts:
        return [_planned(spec, whole if ids is None else partial(_filled, spec, whole, len(ids)))]
    experts = range(spec.shape[0]) if ids is None else ids
    parts = range(len(spec.parts))

    def matrix(expert: int, part: int) -> Iterator[np.ndarray]:
        yield pieces.part(spec, leaf(), expert, part)

    if fused:
        return [_fused(spec, (partial(matrix, expert, part) for expert in experts for part in parts))]
    return [
        PlannedTensor(spec.file_name(row, part), "BF16", spec.matrix, partial(matrix, expert, part))
        for row, expert in enumerate(experts)
        for part in parts
    ]


def _matrix(spec: TensorSpec, name: str, stored: Stored) -> list[PlannedTensor]:
    """A tensor of the parent's files as it is, under another name, its scales included."""
    if isinstance(stored, ScaledTensor) and spec.dtype == "F8_E4M3":
        codes, scales = stored.sources
        end = scales.name.removeprefix(codes.name)
        beside = PlannedTensor(name + end, scales.dtype, scales.shape, partial(scales.chunks, weights=True), True)
        return [PlannedTensor(name, codes.dtype, codes.shape, partial(codes.chunks, weights=True)), beside]
    return [PlannedTensor(name, spec.dtype, stored.shape, partial(_copy, spec, stored), spec.path[-1] == "scales")]


def _copy(spec: TensorSpec, stored: Stored) -> Iterator[np.ndarray]:
    """A tensor's bytes, or its values rounded to the table's type where it has another one."""
    if isinstance(stored, StoredTensor) and stored.dtype == spec.dtype:
        yield from stored.chunks(weights=True)
    else:
        yield as_stored(spec, stored.read(weights=True))


def _rows(spec: TensorSpec, stored: Stored, ids: Sequence[int]) -> Iterator[np.ndarray]:
    """The kept experts' rows of a tensor, one after the other."""
    for expert in ids:
        yield as_stored(spec, stored.read((slice(expert, expert + 1),), weights=True))


def _filled(spec: TensorSpec, pieces: _Pieces, rows: int) -> Iterator[np.ndarray]:
    """Pieces that hold `rows` rows, then rows of experts that are never chosen, up to the tensor's shape."""
    yield from pieces()
    fill = NEVER if spec.path[-1] == "router_bias" else 0
    for _ in range(spec.shape[0] - rows):
        yield as_stored(spec, np.full((1, *spec.shape[1:]), fill, np.uint8 if spec.dtype == "U8" else np.float32))


def _fused(spec: TensorSpec, matrices: Iterable[_Pieces]) -> PlannedTensor:
    """The matrices of all experts as one tensor, [experts, outputs, inputs]."""
    experts, inputs, outputs = spec.shape
    each = list(matrices)
    return PlannedTensor(
        spec.name, "BF16", (experts, outputs, inputs), lambda: chain.from_iterable(one() for one in each)
    )


def _planned(spec: TensorSpec, pieces: _Pieces) -> PlannedTensor:
    return PlannedTensor(spec.name, spec.dtype, spec.shape, pieces, with_previous=spec.path[-1] == "scales")
