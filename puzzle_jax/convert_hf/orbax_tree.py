"""Parameters as an Orbax checkpoint, the form that training reads and writes.

A directory holds `params`, an Orbax v1 tree (packed matrices as {"blocks", "scales"}), and `hf`, the files that a
Hugging Face directory has beside its weights, config.json first. Large leaves are read one at a time, so that an
export does not hold the whole model in memory.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form, write_config
from puzzle_jax.convert_hf.export import CARRIED, OF_A_CHILD, config_bytes
from puzzle_jax.convert_hf.load import Checkpoint
from puzzle_jax.convert_hf.other_forms import CONFIG, ORBAX_HF, ORBAX_PARAMS
from puzzle_jax.convert_hf.table import ParamPath, dotted
from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.convert_hf.tensors.writer import naming_target
from puzzle_jax.errors import CheckpointError, PuzzleError, shown
from puzzle_jax.files import Json, read_bytes
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, is_spec, param_specs

try:
    from orbax.checkpoint import v1 as ocp  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # releases in which v1 is still experimental
    from orbax.checkpoint.experimental import v1 as ocp

PARAMS, KV_SCALES = ORBAX_PARAMS, "kv_scales.json"
_LATE_SECONDS = 0.5
_TOGETHER = 16 << 20  # bytes of leaves that are read at once
_LARGEST = float(np.finfo(np.float32).max)


class Opened(NamedTuple):
    """A checkpoint whose weights are read on demand.

    Attributes:
      checkpoint: the leaves of its `params` are functions that read a parameter from the disk.
      files: the other files that a checkpoint carries, by name.
      left_out: names of further files, which do not belong to a checkpoint.
    """

    checkpoint: Checkpoint
    files: dict[str, bytes]
    left_out: tuple[str, ...]


def refuse_existing(out: Path) -> None:
    """Raises `PuzzleError` where `out` holds something."""
    with naming_target(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise PuzzleError(f"{out} exists and is not empty; choose another directory")


def save_params(out: Path, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> None:
    """Writes a checkpoint's parameters, from every process of a mesh, and the files beside them.

    Raises `PuzzleError` where `out` holds something or cannot be written.
    """
    out = Path(out).absolute()
    refuse_existing(out)
    with naming_target(out):
        work = out.with_name(f".{out.name}.partial")
        shutil.rmtree(work, ignore_errors=True)
        try:
            (work / ORBAX_HF).mkdir(parents=True)
            _save(work / PARAMS, _plain(checkpoint.params))
            for name, content in files.items():
                (work / ORBAX_HF / name).write_bytes(content)
            form = "bf16" if checkpoint.form == "fp8" else None  # matrices in FP8 were decoded when they were read
            data = write_config(checkpoint.config, checkpoint.config_json, form=form)
            (work / ORBAX_HF / CONFIG).write_bytes(config_bytes(data))
            if checkpoint.kv_scales is not None:
                record = {kind: np.asarray(values).tolist() for kind, values in checkpoint.kv_scales._asdict().items()}
                (work / ORBAX_HF / KV_SCALES).write_text(json.dumps(record))
            if out.exists():
                out.rmdir()
            work.rename(out)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def _save(path: Path, tree: PyTree) -> None:
    try:
        ocp.save(str(path), tree)
    except Exception as error:  # Orbax raises whatever its storage raised
        raise OSError(_first_line(error)) from error


def open_params(directory: Path) -> Opened:
    """Opens a checkpoint; its parameters are read on demand.

    Raises `CheckpointError` where it is not one of ours, holds anything but files beside the parameters, or its
    parameters are not those of its config.json.
    """
    hf = directory / ORBAX_HF
    files, left_out = _files(hf)
    source = hf / CONFIG
    data = read_json(source)
    config, form = parse_config(data, source), parse_form(data, source)
    path = str((directory / PARAMS).absolute())
    abstract = _guarded(path, lambda: ocp.metadata(path).metadata)
    if problem := _misfit(abstract, config):
        raise CheckpointError(f"{path} does not fit {source}: {problem}")
    leaves, tree = jax.tree.flatten(abstract)

    sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves]
    groups, held = _groups(sizes), dict[int, np.ndarray]()

    def reader(index: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            if (ready := held.get(index)) is not None:
                return ready
            wanted: list[Json] = [ocp.PLACEHOLDER] * len(leaves)
            for each in groups[index]:
                wanted[each] = np.empty(leaves[each].shape, leaves[each].dtype)
            found = jax.tree.leaves(_guarded(path, lambda: ocp.load(path, jax.tree.unflatten(tree, wanted))))
            held.clear()
            held.update((each, found[each]) for each in groups[index])
            return found[index]

        return read

    readers = jax.tree.unflatten(tree, [reader(index) for index in range(len(leaves))])
    kv_scales = _scales(hf / KV_SCALES, config.num_layers) if (hf / KV_SCALES).is_file() else None
    return Opened(Checkpoint(config, _packed(readers), form, directory, data, kv_scales), files, left_out)


def _groups(sizes: Sequence[int]) -> list[range]:
    """The neighbours that each leaf is read with, up to `_TOGETHER` bytes in all: a call of Orbax takes 15 ms.

    Args:
      sizes: bytes of each leaf.
    """
    groups, start = [], 0
    for index in range(len(sizes)):
        if index + 1 == len(sizes) or sum(sizes[start : index + 2]) > _TOGETHER:
            groups += [range(start, index + 1)] * (index + 1 - start)
            start = index + 1
    return groups


def _files(hf: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The files that belong to a checkpoint, and the names of those that do not.

    A link or a directory could bring in anything from anywhere, so neither is followed: a link in place of a file is
    refused, and so is any directory.
    """
    files: dict[str, bytes] = {}
    left_out = []
    try:
        for entry in sorted(os.scandir(hf), key=lambda entry: entry.name):
            known = entry.name in (CONFIG, KV_SCALES, *CARRIED, *OF_A_CHILD)
            if entry.is_dir(follow_symlinks=False):
                raise CheckpointError(f"{shown(entry.path)} is a directory, but only files may be there; move it away")
            if not known:
                left_out.append(entry.name)
            elif not entry.is_file(follow_symlinks=False):
                raise CheckpointError(f"{entry.path} is no regular file; put the file itself in its place")
            elif entry.name not in (CONFIG, KV_SCALES):
                files[entry.name] = read_bytes(Path(entry.path), CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{hf} cannot be read: {error.strerror}") from None
    return files, tuple(left_out)


def _misfit(abstract: PyTree, config: ModelConfig) -> str:
    """How the stored tree differs from that of the model's parameters; empty where it does not."""
    stored = {path: tuple(leaf.shape) for path, leaf in _leaves(abstract).items() if hasattr(leaf, "shape")}
    for path, spec in _leaves(param_specs(config)).items():
        name, found = dotted(path), stored.pop(path, None)
        if found is None and path[-1] in EXPERT_MATRICES:
            blocks, scales = (stored.pop((*path, half), None) for half in ("blocks", "scales"))
            if blocks is None or scales is None:
                return f"{name} is missing"
            experts, inputs, outputs = spec.shape
            if scales != (experts, outputs, inputs // GROUP) or math.prod(blocks) * 2 != math.prod(spec.shape):
                return f"{name} has blocks of shape {list(blocks)} and scales of shape {list(scales)}"
        elif found is None:
            return f"{name} is missing"
        elif found != spec.shape:
            return f"{name} has shape {list(found)}, but the model needs {list(spec.shape)}"
    return f"{dotted(min(stored, key=str))} is no parameter of this model" if stored else ""


def _leaves(tree: PyTree) -> dict[ParamPath, PyTree]:
    return {
        tuple(key.idx if isinstance(key, jax.tree_util.SequenceKey) else str(key.key) for key in keys): leaf
        for keys, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_spec)
    }


def _scales(path: Path, layers: int) -> KVScales:
    """Reads the scales that `save_params` wrote."""
    data = read_json(path)
    for kind in "kv":
        values = data.get(kind)
        rule = f"must be a list of {layers} finite numbers above 0"
        if not isinstance(values, list) or len(values) != layers or not all(map(_is_scale, values)):
            raise CheckpointError(f"{path}: {kind} is {shown(values)}, but {rule}")
    return KVScales(*(jnp.asarray(data[kind], jnp.float32) for kind in "kv"))


def _is_scale(value: Json) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value <= _LARGEST and bool(np.float32(max(value, 0)) > 0)


def _guarded(path: str, read: Callable[[], PyTree]) -> PyTree:
    """Calls `read`; raises `CheckpointError` where Orbax cannot read, and suppresses its own reports."""
    found, reason = None, "its tree is damaged or missing"
    with _quiet():
        try:
            found = read()
        except Exception as error:  # Orbax raises whatever its storage raised
            reason = _first_line(error)
        if found is None:  # further failures report later: threads when they end, tasks when collected
            time.sleep(_LATE_SECONDS)
            gc.collect()
    if found is None:
        raise CheckpointError(f"{path} cannot be read as an Orbax checkpoint: {reason}")
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the tracebacks in which Orbax, its tasks and its threads report what it then raises or drops."""
    logs, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def _first_line(error: Exception) -> str:
    """The first line of an error's message, printable and of moderate length."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c if c.isprintable() else "?" for c in line[:300])


def _plain(params: Params) -> Params:
    """The tree with packed matrices as dictionaries, which every version of Orbax stores alike."""
    return jax.tree.map(
        lambda leaf: {"blocks": leaf.codes, "scales": leaf.scales} if isinstance(leaf, MXFP4) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, MXFP4),
    )


def _packed(readers: Params) -> Params:
    """The readers, with the two of each packed matrix joined."""

    def is_packed(node: object) -> bool:
        return isinstance(node, Mapping) and set(node) == {"blocks", "scales"}

    def join(node: Json) -> Callable[[], np.ndarray | MXFP4]:
        return partial(_joined, node["blocks"], node["scales"]) if is_packed(node) else node

    return jax.tree.map(join, readers, is_leaf=is_packed)


def _joined(read_blocks: Callable[[], np.ndarray], read_scales: Callable[[], np.ndarray]) -> MXFP4:
    """Reads a packed matrix; checkpoints before version 0.4 hold blocks as [experts, outputs, groups, 16]."""
    blocks, scales = jnp.asarray(read_blocks()), jnp.asarray(read_scales())
    return MXFP4(blocks.reshape(*scales.shape[:2], -1), scales)
