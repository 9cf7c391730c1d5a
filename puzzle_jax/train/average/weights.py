"""The average of two policies' weights: checkpoints A and B from one start become a checkpoint of (1 - w) A + w B.

Weights that were trained from one start lie close enough together that points between them are working models, too
(model soups, arXiv 2203.05482); the paper averages a policy trained for accuracy with one trained for short answers
(arXiv 2602.11937).

Tensors that are equal in both are copied byte for byte. Those that differ must have been trained in A or B according to
their records; otherwise the two do not come from one start. They are averaged in float32 and rounded once, to bf16, or
to MXFP4's grid where trained experts are packed. A weight of 0 or 1 copies all tensors of A or B. Only one tensor, or
one matrix of experts, is in memory at a time.

The scales of an FP8 cache are calibrated anew where a sweep has answers of the average (`train.average.sweep`). Without
a sweep they are the larger ones of A and B: keys and values of the same inputs then lie between those of A and B, and a
scale that is somewhat too large costs e4m3 next to nothing, while one that is too small clips values.

Left out: more than two checkpoints, and per-layer weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE, Origin, export_child
from puzzle_jax.convert_hf.kv_scales import StoredScales
from puzzle_jax.convert_hf.load import build_params, known_scales
from puzzle_jax.convert_hf.pieces import same_tensor
from puzzle_jax.convert_hf.table import ParamPath, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import CHUNK_BYTES, Stored, read_json
from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.files import read_object
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.child import with_delta
from puzzle_jax.model.spec import Params
from puzzle_jax.train.grpo.inputs import recorded_origin

AVERAGED = "averaged"
"""Key of an average's record in provenance.json."""

_SAME_FILES = ("tokenizer.json", "chat_template.jinja")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAME_FIELDS = {
    "config.json": _TOKEN_IDS,
    "generation_config.json": _TOKEN_IDS,
    "tokenizer_config.json": ("chat_template",),
}
_HISTORY = ("grpo", AVERAGED)
"""Records of how A and B came to differ, which the average does not inherit as its own."""


def blend(
    a: Float[np.ndarray, "*shape"], b: Float[np.ndarray, "*shape"], weight: float
) -> Float32[np.ndarray, "*shape"]:
    """(1 - weight) a + weight b in float32; exactly a or b at the ends, the sign of a zero included."""
    a, b = (array.astype(np.float32, copy=False) for array in (a, b))
    if weight in (0, 1):
        return b if weight else a
    return np.float32(1 - weight) * a + np.float32(weight) * b


@dataclass(frozen=True)
class AveragedParameter:
    """A parameter of the average, as an array whose values are read and averaged when they are asked for.

    Attributes:
      specs: its tensor in the checkpoints, or its blocks and scales.
      ours, theirs: the tensors of A and of B.
      weight: weight of B.
    """

    specs: tuple[TensorSpec, ...]
    ours: tuple[Stored, ...]
    theirs: tuple[Stored, ...]
    weight: float

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.specs) == 2:
            experts, outputs, groups = self.specs[1].shape
            return experts, groups * GROUP, outputs
        return self.specs[0].shape[::-1] if self.specs[0].transposed else self.specs[0].shape

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """All values in bf16, averaged a chunk of rows at a time."""
        shape = self.shape if len(self.specs) == 2 else self.specs[0].shape
        values = np.empty(shape, ml_dtypes.bfloat16)
        rows = max(1, CHUNK_BYTES // (4 * int(np.prod(shape[1:]))))
        for start in range(0, len(values), rows):
            values[start : start + rows] = self[start : start + rows]
        values = values.T if self.specs[0].transposed else values
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "..."]:
        """Averaged rows of the tensor as it is stored (matrices, for packed experts), not rounded."""

        def values(tensors: tuple[Stored, ...]) -> np.ndarray:
            first, *scales = (tensor.read((rows,)) for tensor in tensors)
            return mxfp4.decode(first, scales[0]) if scales else first

        return blend(values(self.ours), values(self.theirs), self.weight)

    def on_device(self) -> jax.Array | MXFP4:
        """The values as `load_checkpoint` returns them once they are written."""
        if len(self.specs) == 1:
            return jnp.asarray(np.asarray(self))
        packed = [mxfp4.encode(self[expert : expert + 1]) for expert in range(self.shape[0])]
        blocks, scales = (np.concatenate(halves) for halves in zip(*packed, strict=True))
        return MXFP4(jnp.asarray(blocks.reshape(*blocks.shape[:2], -1)), jnp.asarray(scales))


@dataclass(frozen=True)
class Pair:
    """Two checkpoints that can be averaged.

    Attributes:
      ours, theirs: A and B.
      records: their provenance.
      origins: their origins, the first parent of each, according to the records.
    """

    ours: Description
    theirs: Description
    records: tuple[Mapping[str, Any], Mapping[str, Any]]
    origins: tuple[Origin, Origin]

    @staticmethod
    def open(a: Path, b: Path) -> Pair:
        """Reads headers, records and chat files.

        Raises PuzzleError where one is not a checkpoint with a record, and where they are not models of one kind.
        """
        if a.resolve() == b.resolve():
            raise ConfigError(f"A and B are both {a}, but must be two checkpoints")
        ours, theirs = describe_checkpoint(a), describe_checkpoint(b)
        _check_configs(ours, theirs)
        _check_files(a, b)
        records = _record(a), _record(b)
        for name in ("kept_experts", "windows"):
            mine, other = (record.get(name) for record in records)
            if mine != other:
                raise PuzzleError(f"{b / PROVENANCE}: {name} is {shown(other)}, but {shown(mine)} in {a}")
        origins = _origin(a, records[0], ours.config), _origin(b, records[1], theirs.config)
        return Pair(ours, theirs, records, origins)

    @property
    def directories(self) -> tuple[Path, Path]:
        return self.ours.directory, self.theirs.directory

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of parameters that A or B no longer shares with the first parent."""
        return tuple(sorted({*self.origins[0].trained, *self.origins[1].trained}))

    @cached_property
    def differing(self) -> dict[ParamPath, tuple[TensorSpec, ...]]:
        """The tensors of parameters that are not byte-identical in both. Reads both checkpoints.

        Raises PuzzleError for a parameter that was trained in neither.
        """
        parameters: dict[ParamPath, tuple[TensorSpec, ...]] = {}
        for spec in checkpoint_tensors(self.ours.config, self.ours.form):
            path = spec.parameter
            parameters[path] = (*parameters.get(path, ()), spec)
        differing, trained = {}, frozenset(self.trained)
        for path, specs in parameters.items():
            ours, theirs = self.ours.tensors, self.theirs.tensors
            if all(same_tensor(spec, ours[spec.name], theirs[spec.name]) for spec in specs):
                continue
            if specs[0].parameter_name not in trained:
                a, b = self.directories
                raise PuzzleError(
                    f"{a} and {b} differ in {specs[0].name}, which neither's {PROVENANCE} calls trained, so they do "
                    "not come from one start"
                )
            differing[path] = specs
        return differing

    def delta(self, weight: float) -> Params:
        """The differing parameters as a delta on A: leaves are `AveragedParameter`, or None for equal parameters."""
        table = checkpoint_tensors(self.ours.config, self.ours.form)
        leaves: dict[ParamPath, AveragedParameter | None] = {spec.parameter: None for spec in table}
        for path, specs in self.differing.items():
            ours, theirs = (
                tuple(described.tensors[spec.name] for spec in specs) for described in (self.ours, self.theirs)
            )
            leaves[path] = AveragedParameter(specs, ours, theirs, weight)
        return build_params(self.ours.config, leaves)

    def params(self, loaded: Params, weight: float) -> Params:
        """The average in memory, as `load_checkpoint` returns it from the directory that `write_average` makes.

        Args:
          loaded: A's parameters in bf16, experts as they are stored.
          weight: weight of B.
        """
        if weight == 0:
            return loaded
        return with_delta(loaded, jax.tree.map(AveragedParameter.on_device, self.delta(weight)))

    def kv_scales(self, weight: float) -> StoredScales | None:
        """Scales of an FP8 cache: those of A or B at the ends, otherwise the larger ones of those that exist."""
        found = [known_scales(described) for described in (self.ours, self.theirs)]
        if weight in (0, 1):
            return found[int(weight)]
        present = [scales for scales in found if scales is not None]
        return np.maximum.reduce(present) if present else None


def check_out(out: Path, others: Mapping[str, Path]) -> None:
    """Raises ConfigError where the average may not be written to `out`: it may only replace an earlier average.

    Args:
      others: checkpoints that `out` must not be, by their names in messages.
    """
    for name, other in others.items():
        if out.resolve() == other.resolve():
            raise ConfigError(f"out is {out}, which is {name}; name another directory")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())) and not _is_average(out):
        raise ConfigError(f"out is {out}, which exists and holds no average; name another directory or empty it")


def write_average(
    pair: Pair,
    weight: float,
    out: Path,
    *,
    sweep: Mapping[str, object] | None = None,
    scales: KVScales | None = None,
) -> None:
    """Writes the average; after a kill, calling it again with the same arguments continues the work.

    Args:
      pair: A and B.
      weight: weight of B.
      out: the directory to write; an earlier average there is replaced.
      sweep: how the weight was chosen, for the record.
      scales: scales of the average's FP8 cache; None takes those of A and B.

    Raises PuzzleError where `out` holds something else, and where values of A or B are not finite.
    """
    check_out(out, dict(zip("AB", pair.directories, strict=True)))
    base = pair.theirs if weight == 1 else pair.ours  # at the ends, bytes are copied and nothing is averaged
    config, stored = base.config, None if scales is not None else pair.kv_scales(weight)
    first, _ = pair.records
    averaged: dict[str, object] = {"of": [str(directory) for directory in pair.directories], "weight": weight}
    for name in _HISTORY:
        if any(name in record for record in pair.records):
            averaged[name] = [record.get(name) for record in pair.records]
    if sweep is not None:
        averaged["sweep"] = dict(sweep)
    export_child(
        base.directory,
        out,
        config,
        [list(range(block.num_experts)) for block in config.blocks],
        provenance={
            **{name: value for name, value in first.items() if name not in (*_HISTORY, "kv_scales")},
            AVERAGED: averaged,
        },
        dense_delta=None if weight in (0, 1) else pair.delta(weight),
        kv_scales=scales if stored is None else KVScales(*map(jnp.asarray, stored)),
        origin=pair.origins[0]._replace(trained=pair.trained),
        replace=out.exists() and _is_average(out),
    )


def _is_average(directory: Path) -> bool:
    record = directory / PROVENANCE
    try:
        return AVERAGED in read_object(record)
    except PuzzleError:
        return False


def _check_configs(ours: Description, theirs: Description) -> None:
    for name in (field.name for field in fields(ModelConfig)):
        mine, other = getattr(ours.config, name), getattr(theirs.config, name)
        if mine == other:
            continue
        if name == "blocks" and len(mine) == len(other):
            layer = next(index for index, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1])
            name, mine, other = f"layer {layer}", mine[layer], other[layer]
        elif name == "blocks":
            name, mine, other = "the number of layers", len(mine), len(other)
        raise PuzzleError(f"{theirs.directory / 'config.json'}: {name} is {other}, but {mine} in {ours.directory}")
    if ours.form != theirs.form:
        raise PuzzleError(f"{theirs.directory} stores experts as {theirs.form}, but {ours.directory} as {ours.form}")


def _check_files(a: Path, b: Path) -> None:
    """Checks that both models read and write the same tokens."""
    for name in _SAME_FILES:
        mine, other = (path.read_bytes() if path.is_file() else None for path in (a / name, b / name))
        if mine != other:
            raise PuzzleError(f"{b / name} is not the same as {a / name}, but both models must have the same")
    for name, wanted in _SAME_FIELDS.items():
        mine, other = (read_json(path) if path.is_file() else {} for path in (a / name, b / name))
        for field in wanted:
            if mine.get(field) != other.get(field):
                found, known = shown(other.get(field)), shown(mine.get(field))
                raise PuzzleError(f"{b / name}: {field} is {found}, but {known} in {a / name}")


def _record(directory: Path) -> dict[str, Any]:
    path = directory / PROVENANCE
    if not path.is_file():
        raise PuzzleError(f"{directory} has no {PROVENANCE}, so nobody knows what of it was trained")
    return read_object(path)


def _origin(directory: Path, record: Mapping[str, Any], config: ModelConfig) -> Origin:
    origin = recorded_origin(directory, record, config)
    if origin is None or not all(isinstance(name, str) for name in origin.trained):
        raise PuzzleError(f"{directory / PROVENANCE} does not list kept_experts and the names of trained parameters")
    return origin
