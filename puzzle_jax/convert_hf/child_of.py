"""Opens a child's directory as a view on the parent that it was cut from.

Training and evaluating a view needs the parent's weights and three things of the child: which experts stay, which
windows it has, and what was trained since. The first is in `provenance.json`, the second in config.json, and the third
is found by comparing bytes. A child of another parent of the same shape would run and give wrong results, so the
experts are compared too: routers, biases, and the matrices of one expert per layer, or of all.

Left out: children that were cut by other programs, which keep no record of ids. Where routers and experts were all
trained, nothing is left to compare, and the record is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np

from puzzle_jax.codec import from_plain
from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.export import PROVENANCE
from puzzle_jax.convert_hf.load import build_params
from puzzle_jax.convert_hf.pieces import as_stored, same_bytes, same_tensor
from puzzle_jax.convert_hf.table import ParamPath, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import Stored, read_json
from puzzle_jax.convert_hf.tensors.planned import NEVER
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.files import Json
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.spec import EXPERT_MATRICES, Params

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class OpenedChild:
    """A child that was opened as a view on its parent.

    Attributes:
      child: its kept experts, its windows, and its rotary settings where they differ from the parent's; no delta.
      differing: parameters that differ from the parent's, by their paths in the tree ("layers.3.attention.q_weight");
        `load_delta` reads them.
      provenance: the whole record.
    """

    child: Child
    differing: tuple[str, ...]
    provenance: dict[str, Json]


def open_child(parent: Path, child: Path, *, every_expert: bool = False) -> OpenedChild:
    """Opens a child that `export_child` cut from this parent, trained since or not.

    Reads both checkpoints' dense tensors, routers and biases, a piece at a time, and of the expert matrices one expert
    per layer; routers and experts that are recorded as trained are assumed to differ and are not read.

    Args:
      parent, child: directories.
      every_expert: whether to compare the matrices of all kept experts.

    Raises `CheckpointError` for a damaged checkpoint, `PuzzleError` where the child was not cut from this parent.
    """
    found = _described(parent, child)
    return OpenedChild(found.view, _differing(found, every_expert), found.provenance)


def load_delta(parent: Path, child: Path, differing: Sequence[str]) -> Params:
    """A child's own values as a delta on its parent: float32 NumPy arrays, None for every other parameter.

    Routers and experts have the parent's shapes; experts that the child does not keep have the parent's values.

    Args:
      parent, child: directories that `open_child` accepts.
      differing: parameters to read, as `OpenedChild.differing` names them.

    Raises `ConfigError` for a name that is no parameter.
    """
    parents, childs, view, *_ = _described(parent, child)
    sources: dict[str, list[TensorSpec]] = {}
    for spec in checkpoint_tensors(parents.config, parents.form):
        sources.setdefault(spec.parameter_name, []).append(spec)
    leaves: dict[ParamPath, np.ndarray | None] = {specs[0].parameter: None for specs in sources.values()}
    for name in differing:
        if name not in sources:
            raise ConfigError(f"{name} is no parameter of {parent}")
        specs = sources[name]
        layer = specs[0].layer
        kept = view.kept[layer] if specs[0].by_expert and layer is not None else None
        leaves[specs[0].parameter] = _values(specs, parents, childs, kept)
    return build_params(parents.config, leaves)


@dataclass(frozen=True)
class _Record:
    """The cut as `provenance.json` records it: for every layer, ids of the parent's experts and the window."""

    kept_experts: tuple[tuple[int, ...], ...]
    windows: tuple[int | None, ...]
    trained: tuple[str, ...] = ()


class _Described(NamedTuple):
    parent: Description
    child: Description
    view: Child
    trained: frozenset[str]
    provenance: dict[str, Json]


def _described(parent: Path, child: Path) -> _Described:
    """Both checkpoints by their headers, and the child as its record and its config.json describe it."""
    of_parent, of_child = describe_checkpoint(parent), describe_checkpoint(child)
    source = child / PROVENANCE
    if not source.is_file():
        raise PuzzleError(f"{child} has no {PROVENANCE}, so nobody knows which experts of its parent it keeps")
    provenance = read_json(source)
    record = from_plain(_Record, provenance, str(source))
    kept, windows = record.kept_experts, record.windows
    if _content(parent / TOKENIZER) != _content(child / TOKENIZER):
        _refuse(child, parent, f"{TOKENIZER} is not the parent's")
    _check_configs(of_parent, of_child)
    if of_parent.form != of_child.form:
        _refuse(child, parent, f"its experts are stored as {of_child.form}, the parent's as {of_parent.form}")
    if not len(kept) == len(windows) == of_child.config.num_layers:
        layers = f"{len(kept)} and {len(windows)} layers, config.json of {of_child.config.num_layers}"
        raise PuzzleError(f"{source} has kept_experts and windows of {layers}")
    for layer, (recorded, block) in enumerate(zip(windows, of_child.config.blocks, strict=True)):
        if recorded != block.window:
            raise PuzzleError(f"{source}: windows[{layer}] is {recorded}, but config.json has {block.window}")
    _check_counts(of_child, kept, source)
    rope = of_child.config.rope
    try:
        blocks = tuple(ChildBlock(ids, window) for ids, window in zip(kept, windows, strict=True))
        view = Child(of_parent.config, blocks, rope=None if rope == of_parent.config.rope else rope)
    except ConfigError as error:
        raise PuzzleError(f"{source} does not fit {parent}: {error}") from None
    return _Described(of_parent, of_child, view, frozenset(record.trained), provenance)


def _check_configs(parent: Description, child: Description) -> None:
    """Everything but blocks and rotary settings must be the parent's."""
    for name in (field.name for field in fields(ModelConfig) if field.name not in ("blocks", "rope")):
        ours, theirs = getattr(child.config, name), getattr(parent.config, name)
        if ours != theirs:
            _refuse(child.directory, parent.directory, f"{name} is {ours}, but {theirs} in the parent")
    ours, theirs = child.config.num_layers, parent.config.num_layers
    if ours != theirs:
        _refuse(child.directory, parent.directory, f"it has {ours} layers, but the parent {theirs}")


def _check_counts(child: Description, kept: Sequence[Sequence[int]], source: Path) -> None:
    """Every layer must have the recorded experts, or all be filled up to one number by never-chosen ones."""
    counts = [block.num_experts for block in child.config.blocks]
    filled = max(map(len, kept))
    for layer, (ids, count) in enumerate(zip(kept, counts, strict=True)):
        if len(ids) == count:
            continue
        if set(counts) != {filled} or not _never_chosen(child, layer, len(ids)):
            raise PuzzleError(f"{source} keeps {len(ids)} experts in layer {layer}, but config.json has {count}")


def _never_chosen(child: Description, layer: int, first: int) -> bool:
    """Returns whether a layer's experts from `first` on are only there to fill a shape."""
    bias = child.tensors.get(f"model.layers.{layer}.mlp.router.bias")
    if bias is None:
        return False
    spare = bias.read((slice(first, None),))
    return bool((spare == np.asarray(NEVER, spare.dtype)).all())


def _differing(found: _Described, every_expert: bool) -> tuple[str, ...]:
    """Parameters that are not the parent's; raises where routers or experts not recorded as trained differ."""
    parent, child, view, trained, _ = found
    table = checkpoint_tensors(child.config, child.form)
    differing: set[str] = set()
    for spec in sorted(table, key=lambda spec: not spec.by_expert):  # refusals first, before gigabytes are read
        name, ours, theirs = spec.parameter_name, child.tensors[spec.name], parent.tensors[spec.name]
        if not spec.by_expert or spec.layer is None:
            if not same_tensor(spec, ours, theirs):
                differing.add(name)
        elif name in trained:
            differing.add(name)
        else:
            ids = view.kept[spec.layer]
            sampled = range(len(ids))
            if spec.parameter[-1] in EXPERT_MATRICES and not every_expert:
                sampled = [spec.layer % len(ids)]  # a different row from layer to layer
            for row in sampled:
                if not same_bytes(_row(spec, ours, row), _row(spec, theirs, ids[row])):
                    reason = f"{spec.name} differs in row {row}, expert {ids[row]} of the parent"
                    _refuse(child.directory, parent.directory, reason)
    names = (spec.parameter_name for spec in table)
    return tuple(name for name in dict.fromkeys(names) if name in differing)


def _row(spec: TensorSpec, stored: Stored, index: int) -> np.ndarray:
    return as_stored(spec, stored.read((slice(index, index + 1),)))


def _values(
    specs: Sequence[TensorSpec], parent: Description, child: Description, kept: Sequence[int] | None
) -> np.ndarray:
    """One parameter in float32: the child's values, and for experts that it does not keep the parent's.

    Args:
      specs: the parameter's tensor in the parent, or its blocks and scales.
    """
    if kept is None:
        values = child.tensors[specs[0].name].read(weights=True).astype(np.float32)
    else:
        rows = dict(zip(kept, range(len(kept)), strict=True))
        experts = specs[0].shape[0]
        places = [(child, rows[expert]) if expert in rows else (parent, expert) for expert in range(experts)]
        parts = (_expert([described.tensors[spec.name] for spec in specs], row) for described, row in places)
        first = next(parts)
        values = np.empty((experts, *first.shape[1:]), np.float32)
        for expert, part in enumerate(chain([first], parts)):
            values[expert] = part[0]
    return np.ascontiguousarray(values.T) if specs[0].transposed else values


def _expert(tensors: Sequence[Stored], row: int) -> np.ndarray:
    """One expert's values in float32 as a stack of one, decoded where blocks and scales are given."""
    first, *scales = (stored.read((slice(row, row + 1),), weights=True) for stored in tensors)
    return mxfp4.decode(first, scales[0], np.float32) if scales else first.astype(np.float32)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _refuse(child: Path, parent: Path, reason: str) -> NoReturn:
    raise PuzzleError(f"{child} was not cut from {parent}: {reason}")
