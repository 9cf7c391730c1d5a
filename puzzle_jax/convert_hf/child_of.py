"""A child's directory as the view on its parent that it was cut from.

Training and evaluating a view needs the parent's weights and three things of the child: which experts stay, which
windows it has, and what was trained since. `provenance.json` says the first, config.json the second, and the third is
found by comparing bytes. A child of another parent of the same shape would run and be wrong, so the experts are
compared too: routers, biases, and the matrices of one expert per layer, or of all.

Left out: children that were cut by other programs, which keep no record of ids; children whose routers and experts were
all trained have nothing left to compare, and their record is believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.export import NEVER, PROVENANCE
from puzzle_jax.convert_hf.load import build_params
from puzzle_jax.convert_hf.pieces import as_stored, dotted, parameter_path
from puzzle_jax.convert_hf.table import Path as ParamPath
from puzzle_jax.convert_hf.table import TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import StoredTensor, read_json
from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.model.spec import EXPERT_MATRICES, Params

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class OpenedChild:
    """A child, opened.

    Attributes:
      child: its kept experts, its windows, and its rotary settings where they differ from the parent's; no delta.
      differing: parameters that are not the parent's, by their places in the tree ("layers.3.attention.q_weight");
        `load_delta` reads them.
      provenance: the whole record.
    """

    child: Child
    differing: tuple[str, ...]
    provenance: dict[str, Any]


def open_child(parent: Path, child: Path, *, every_expert: bool = False) -> OpenedChild:
    """Opens a child that `export_child` cut from this parent, trained since or not.

    Reads both checkpoints' dense tensors, routers and biases, a piece at a time, and of the expert matrices one expert
    per layer; routers and experts that the record calls trained are taken to differ and not read.

    Args:
      parent, child: directories.
      every_expert: compares the matrices of all kept experts.

    Raises `CheckpointError` for a damaged checkpoint, `PuzzleError` where the child was not cut from this parent.
    """
    parents, childs, view, provenance = _described(parent, child)
    differing = _differing(parents, childs, view, frozenset(provenance.get("trained", ())), every_expert)
    return OpenedChild(view, differing, provenance)


def load_delta(parent: Path, child: Path, differing: Sequence[str]) -> Params:
    """A child's own values as a delta on its parent: float32 NumPy arrays, None for every other parameter.

    Routers and experts have the parent's shapes; what the child does not keep has the parent's values.

    Args:
      parent, child: directories that `open_child` accepts.
      differing: parameters to read, as `OpenedChild.differing` names them.

    Raises `ConfigError` for a name that is no parameter.
    """
    parents, childs, view, _ = _described(parent, child)
    sources: dict[str, list[TensorSpec]] = {}
    for spec in checkpoint_tensors(parents.config, parents.form):
        sources.setdefault(dotted(parameter_path(spec)), []).append(spec)
    leaves: dict[ParamPath, Any] = {parameter_path(specs[0]): None for specs in sources.values()}
    for name in differing:
        if name not in sources:
            raise ConfigError(f"{name} is no parameter of {parent}")
        specs = sources[name]
        layer = specs[0].layer
        kept = view.kept[layer] if specs[0].by_expert and layer is not None else None
        leaves[parameter_path(specs[0])] = _values(specs, parents, childs, kept)
    return build_params(parents.config, leaves)


class _Described(NamedTuple):
    parent: Description
    child: Description
    view: Child
    provenance: dict[str, Any]


def _described(parent: Path, child: Path) -> _Described:
    """Both checkpoints by their headers, and the child as its record and its config.json tell it."""
    of_parent, of_child = describe_checkpoint(parent), describe_checkpoint(child)
    source = child / PROVENANCE
    if not source.is_file():
        raise PuzzleError(f"{child} has no {PROVENANCE}, so nobody knows which experts of its parent it keeps")
    provenance = read_json(source)
    kept, windows = _record(provenance, source)
    if _content(parent / TOKENIZER) != _content(child / TOKENIZER):
        _refuse(child, parent, f"{TOKENIZER} is not the parent's")
    _check_configs(of_parent, of_child)
    if of_parent.form != of_child.form:
        _refuse(child, parent, f"its experts are stored as {of_child.form}, the parent's as {of_parent.form}")
    if not len(kept) == len(windows) == of_child.config.num_layers:
        layers = f"{len(kept)} and {len(windows)} layers, config.json of {of_child.config.num_layers}"
        raise PuzzleError(f"{source} tells kept_experts and windows of {layers}")
    for layer, (recorded, block) in enumerate(zip(windows, of_child.config.blocks, strict=True)):
        if recorded != block.window:
            raise PuzzleError(f"{source}: windows[{layer}] is {recorded}, but config.json says {block.window}")
    _check_counts(of_child, kept, source)
    rope = of_child.config.rope
    try:
        blocks = tuple(ChildBlock(ids, window) for ids, window in zip(kept, windows, strict=True))
        view = Child(of_parent.config, blocks, rope=None if rope == of_parent.config.rope else rope)
    except ConfigError as error:
        raise PuzzleError(f"{source} does not fit {parent}: {error}") from None
    return _Described(of_parent, of_child, view, provenance)


def _record(provenance: dict[str, Any], source: Path) -> tuple[tuple[tuple[int, ...], ...], tuple[int | None, ...]]:
    """The kept experts and windows that a record tells."""

    def field(name: str, accepts: Any, rule: str, default: Any = None) -> list[Any]:
        value = provenance.get(name, default)
        if not (isinstance(value, list) and all(map(accepts, value))):
            raise PuzzleError(f"{source}: {name} is {shown(value)}, but must be {rule}")
        return value

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def ids(value: Any) -> bool:
        return isinstance(value, list) and all(map(whole, value))

    field("trained", lambda name: isinstance(name, str), "a list of names", [])
    kept = field("kept_experts", ids, "one list of ids per layer")
    windows = field("windows", lambda width: width is None or whole(width), "one width or null per layer")
    return tuple(map(tuple, kept)), tuple(windows)


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
    """Every layer has the recorded experts, or every layer is filled up to the same number with ones never chosen."""
    counts = [block.num_experts for block in child.config.blocks]
    filled = max(map(len, kept))
    for layer, (ids, count) in enumerate(zip(kept, counts, strict=True)):
        if len(ids) == count:
            continue
        spare = child.tensors[f"model.layers.{layer}.mlp.router.bias"].read((slice(len(ids), count),))
        never = np.asarray(NEVER, spare.dtype)
        if set(counts) != {filled} or not (spare == never).all():
            raise PuzzleError(f"{source} keeps {len(ids)} experts in layer {layer}, but config.json says {count}")


def _differing(
    parent: Description, child: Description, view: Child, trained: frozenset[str], every_expert: bool
) -> tuple[str, ...]:
    """Parameters that are not the parent's; raises where routers or experts differ without being called trained."""
    table = checkpoint_tensors(child.config, child.form)
    differing: set[str] = set()
    for spec in sorted(table, key=lambda spec: not spec.by_expert):  # what refuses first, before gigabytes are read
        name, ours, theirs = dotted(parameter_path(spec)), child.tensors[spec.name], parent.tensors[spec.name]
        if not spec.by_expert or spec.layer is None:
            if not _same_tensor(spec, ours, theirs):
                differing.add(name)
        elif name in trained:
            differing.add(name)
        else:
            ids = view.kept[spec.layer]
            sampled = range(len(ids))
            if parameter_path(spec)[-1] in EXPERT_MATRICES and not every_expert:
                sampled = [spec.layer % len(ids)]  # another place from layer to layer
            for row in sampled:
                if not _same(_row(spec, ours, row), _row(spec, theirs, ids[row])):
                    reason = f"{spec.name} differs in row {row}, expert {ids[row]} of the parent"
                    _refuse(child.directory, parent.directory, reason)
    names = (dotted(parameter_path(spec)) for spec in table)
    return tuple(name for name in dict.fromkeys(names) if name in differing)


def _same_tensor(spec: TensorSpec, ours: StoredTensor, theirs: StoredTensor) -> bool:
    if ours.dtype == theirs.dtype:
        return all(_same(*pair) for pair in zip(ours.chunks(), theirs.chunks(), strict=True))
    return _same(as_stored(spec, ours.read()), as_stored(spec, theirs.read()))


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the bytes are equal."""
    x, y = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (a, b))
    return np.array_equal(x, y)


def _row(spec: TensorSpec, stored: StoredTensor, index: int) -> np.ndarray:
    return as_stored(spec, stored.read((slice(index, index + 1),)))


def _values(
    specs: Sequence[TensorSpec], parent: Description, child: Description, kept: Sequence[int] | None
) -> np.ndarray:
    """One parameter in float32: the child's values, and where it keeps some experts, the parent's of the others.

    Args:
      specs: its tensor in the parent, or blocks and scales.
    """
    if kept is None:
        values = child.tensors[specs[0].name].values().astype(np.float32)
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


def _expert(tensors: Sequence[StoredTensor], row: int) -> np.ndarray:
    """One expert's values in float32 as a stack of one, decoded where blocks and scales are given."""
    first, *scales = (stored.values((slice(row, row + 1),)) for stored in tensors)
    return mxfp4.decode(first, scales[0], np.float32) if scales else first.astype(np.float32)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _refuse(child: Path, parent: Path, reason: str) -> NoReturn:
    raise PuzzleError(f"{child} was not cut from {parent}: {reason}")
