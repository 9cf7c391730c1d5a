"""Finds the tensors of the table among those of a checkpoint's files, and checks names, types and shapes.

Files hold an expert's matrices one by one, `mlp.experts.3.gate_proj.weight` [outputs, inputs], or in the fused form of
transformers 5 stacked, `mlp.experts.gate_up_proj` [experts, outputs, inputs] with the rows of gate before those of up.
A matrix in FP8 has its scales beside it, `weight_scale_inv`. Nothing here imports JAX or reads weights.

Left out: fused experts in FP8.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from puzzle_jax.convert_hf.table import BLOCK, TensorSpec
from puzzle_jax.convert_hf.tensors.composed import ScaledTensor, StackedExperts, slices_of
from puzzle_jax.convert_hf.tensors.files import Stored, StoredTensor

FLOATS = ("BF16", "F16", "F32")
SCALES = "_scale_inv"
"""The end of the name of a matrix's scales, after its own name."""


@dataclass
class Arranged:
    """The tensors of a table, as far as they were found.

    Attributes:
      tensors: by their names in the table.
      used: names in the files that belong to one of them.
      problems: what is wrong, one phrase each.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def arrange(table: Sequence[TensorSpec], files: Mapping[str, StoredTensor], lost: Container[str] = ()) -> Arranged:
    """Finds the tensors of `table` in the files.

    Args:
      files: all tensors of the files by name.
      lost: names that are missing for a reason that is known already.
    """
    finder = _Finder(files, lost, Arranged())
    for spec in table:
        stored = finder.stacked(spec) if spec.parts else finder.matrix(spec, spec.name, spec.shape)
        if stored is not None:
            finder.found.tensors[spec.name] = stored
    return finder.found


@dataclass(frozen=True)
class _Finder:
    files: Mapping[str, StoredTensor]
    lost: Container[str]
    found: Arranged

    def matrix(self, spec: TensorSpec, name: str, shape: Sequence[int]) -> StoredTensor | ScaledTensor | None:
        """A tensor of this name and shape with the type of `spec`, its scales included; None where it is not right."""
        stored = self._checked(name, shape, FLOATS if spec.dtype == "BF16" else (spec.dtype,))
        if spec.dtype != "F8_E4M3":
            return stored
        blocks = [-(-size // BLOCK) for size in shape]
        scales = self._checked(name + SCALES, blocks, FLOATS)
        return ScaledTensor(stored, scales) if stored and scales else None

    def stacked(self, spec: TensorSpec) -> StackedExperts | None:
        """The matrices of all experts; those after the first wrong one are not checked."""
        fused = spec.by_expert and (spec.name in self.files or spec.name in self.lost)
        matrices = self._fused(spec) if fused else self._one_by_one(spec)
        flat = [matrix for parts in matrices for matrix in parts]
        if not flat:
            if spec.by_expert:
                self.found.used.update(self._of_experts.get(spec.name.rpartition(".")[0], ()))
            return None
        if other := next((matrix for matrix in flat if matrix.dtype != flat[0].dtype), None):
            self.found.problems.append(
                f"{other.name} is stored as {other.dtype}, but {flat[0].name} as {flat[0].dtype}; all experts of a "
                "layer must have one type"
            )
            return None
        return StackedExperts(spec.name, matrices, fused)

    @cached_property
    def _of_experts(self) -> dict[str, list[str]]:
        """Names in the files by the layer's experts that they belong to."""
        groups: dict[str, list[str]] = {}
        for name in self.files:
            before, found, _ = name.partition(".experts.")
            if found:
                groups.setdefault(f"{before}.experts", []).append(name)
        return groups

    def _one_by_one(self, spec: TensorSpec) -> tuple[tuple[StoredTensor | ScaledTensor, ...], ...]:
        experts = []
        for expert in range(spec.shape[0]):
            parts = []
            for part in range(len(spec.parts)):
                if (matrix := self.matrix(spec, spec.file_name(expert, part), spec.matrix)) is None:
                    return ()
                parts.append(matrix)
            experts.append(tuple(parts))
        return tuple(experts)

    def _fused(self, spec: TensorSpec) -> tuple[tuple[StoredTensor, ...], ...]:
        if spec.dtype == "F8_E4M3":
            self.found.problems.append(f"{spec.name} holds all experts of a layer, which in FP8 is not supported")
            return ()
        experts, inputs, outputs = spec.shape
        stored = self._checked(spec.name, (experts, outputs, inputs), FLOATS)
        if stored is None:
            return ()
        each = len(spec.parts)
        cut = slices_of(stored, spec.matrix, experts * each)
        return tuple(tuple(cut[first : first + each]) for first in range(0, len(cut), each))

    def _checked(self, name: str, shape: Sequence[int], dtypes: Sequence[str]) -> StoredTensor | None:
        """The tensor of this name, if it has this shape and one of these types."""
        self.found.used.add(name)
        stored = self.files.get(name)
        if stored is None:
            if name not in self.lost:
                self.found.problems.append(f"{name} is missing")
        elif list(stored.shape) != list(shape):
            rule = f"has shape {list(stored.shape)}, but config.json asks for {list(shape)}"
            self.found.problems.append(f"{stored.file.name}: {name} {rule}")
        elif stored.dtype not in dtypes:
            rule = f"is stored as {stored.dtype}, but must be {' or '.join(dtypes)}"
            self.found.problems.append(f"{stored.file.name}: {name} {rule}")
        else:
            return stored
        return None
