"""Parameters as an Orbax checkpoint, the form that training reads and writes.

A directory holds `params`, an Orbax v1 tree (packed matrices as {"blocks", "scales"}), and `hf`, the files that a
Hugging Face directory has beside its weights, config.json first. Leaves can be read one at a time, so that an export
needs no room for the model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.config_json import parse_config, parse_form, write_config
from puzzle_jax.convert_hf.describe import ORBAX_HF
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.convert_hf.tensor_files import read_json
from puzzle_jax.errors import CheckpointError, PuzzleError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.spec import Params

try:
    from orbax.checkpoint import v1 as ocp  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # where v1 has not left its trial yet
    from orbax.checkpoint.experimental import v1 as ocp

PARAMS, KV_SCALES = "params", "kv_scales.json"


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights come later.

    Attributes:
      config: the model.
      form: how its experts are to be stored.
      config_json: the whole content of config.json.
      files: the other files by name.
      params: the tree of `model.spec`; leaves are functions that read a parameter from the disk.
      kv_scales: of an FP8 key-value cache.
    """

    config: ModelConfig
    form: Form
    config_json: dict[str, Any]
    files: dict[str, bytes]
    params: Params
    kv_scales: KVScales | None = None


def save_params(
    out: Path,
    config: ModelConfig,
    params: Params,
    *,
    config_json: Mapping[str, Any],
    files: Mapping[str, bytes],
    kv_scales: KVScales | None = None,
) -> None:
    """Writes parameters, from every process of a mesh; raises `PuzzleError` where `out` holds something."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PuzzleError(f"{out} exists and is not empty; choose another directory")
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    (work / ORBAX_HF).mkdir(parents=True)
    ocp.save(str(work / PARAMS), _plain(params))
    for name, content in files.items():
        (work / ORBAX_HF / name).write_bytes(content)
    (work / ORBAX_HF / "config.json").write_text(json.dumps(write_config(config, dict(config_json)), indent=2) + "\n")
    if kv_scales is not None:
        record = {kind: np.asarray(values).tolist() for kind, values in zip("kv", kv_scales, strict=True)}
        (work / ORBAX_HF / KV_SCALES).write_text(json.dumps(record))
    if out.exists():
        out.rmdir()
    work.rename(out)


def open_params(directory: Path) -> Opened:
    """Reads what a checkpoint is; raises `CheckpointError` where it is none of ours or does not fit its config.json."""
    source = directory / ORBAX_HF / "config.json"
    data = read_json(source)
    config, form = parse_config(data, source), parse_form(data, source)
    path = str((directory / PARAMS).resolve())
    abstract = _guarded(path, lambda: ocp.metadata(path).metadata)
    leaves, tree = jax.tree.flatten(abstract)

    def reader(index: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            wanted: list[Any] = [ocp.PLACEHOLDER] * len(leaves)
            wanted[index] = np.empty(leaves[index].shape, leaves[index].dtype)
            found = _guarded(path, lambda: ocp.load(path, jax.tree.unflatten(tree, wanted)))
            return jax.tree.leaves(found)[index]

        return read

    readers = jax.tree.unflatten(tree, [reader(index) for index in range(len(leaves))])
    files = {file.name: file.read_bytes() for file in (directory / ORBAX_HF).iterdir() if file != source}
    scales = files.pop(KV_SCALES, None)
    kv_scales = None if scales is None else KVScales(**{k: jnp.asarray(v) for k, v in json.loads(scales).items()})
    return Opened(config, form, data, files, _packed(readers), kv_scales)


def _guarded(path: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # Orbax raises whatever its storage raised
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as an Orbax checkpoint: {reason}") from None


def _plain(node: Any) -> Any:
    """The tree with packed matrices as dictionaries, which every version of Orbax stores alike."""
    if isinstance(node, MXFP4):
        return {"blocks": node.codes, "scales": node.scales}
    if isinstance(node, Mapping):
        return {name: _plain(child) for name, child in node.items()}
    return [_plain(child) for child in node] if isinstance(node, list) else node


def _packed(node: Any) -> Any:
    """Readers, those of packed matrices joined."""
    if isinstance(node, Mapping):
        if set(node) == {"blocks", "scales"}:
            return lambda: _joined(jnp.asarray(node["blocks"]()), jnp.asarray(node["scales"]()))
        return {name: _packed(child) for name, child in node.items()}
    return [_packed(child) for child in node] if isinstance(node, list) else node


def _joined(blocks: jax.Array, scales: jax.Array) -> MXFP4:
    """Checkpoints before version 0.4 hold blocks as [experts, outputs, groups, 16]."""
    return MXFP4(blocks.reshape(*scales.shape[:2], -1), scales)
