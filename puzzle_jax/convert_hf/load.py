"""Import of gpt-oss checkpoints: a directory in, a configuration and a parameter tree out.

Everything is checked against the table of tensors before a byte of weights is read, and all problems are
reported together. Packed experts stay packed; other tensors may be stored in BF16, F16 or F32 and become
`dtype`.

Left out: downloading, pickled weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.kv_scales import is_kv_scale, read_kv_scales
from puzzle_jax.convert_hf.mxfp4 import NOT_A_NUMBER
from puzzle_jax.convert_hf.table import Form, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.table import Path as ParamPath
from puzzle_jax.convert_hf.tensor_files import StoredTensor, open_tensors, read_json
from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.spec import Params

Place = Callable[[ParamPath, np.ndarray], jax.Array]

_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a directory.

    Attributes:
      config: what the model is.
      params: its weights, in the structure of `model.spec`.
      form: how the experts are stored, "mxfp4" or "bf16".
      directory: where it was read.
      config_json: the whole content of config.json.
      kv_scales: of an FP8 key-value cache, where the checkpoint carries them.
    """

    config: ModelConfig
    params: Params
    form: Form
    directory: Path
    config_json: dict[str, Any]
    kv_scales: KVScales | None = None


@dataclass(frozen=True)
class Description:
    """A checkpoint without its weights; attributes as in `Checkpoint`, and its checked tensors by name."""

    config: ModelConfig
    form: Form
    directory: Path
    config_json: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    kv_scales: KVScales | None = None


def read_config(directory: Path | str) -> ModelConfig:
    """The model that a checkpoint directory (or a config.json) describes; weights need not be there.

    Raises `CheckpointError` when the file is missing or describes no gpt-oss model.
    """
    path = Path(directory)
    path = path if path.suffix == ".json" else path / "config.json"
    return parse_config(read_json(path), path)


def describe_checkpoint(directory: Path | str) -> Description:
    """Reads config.json and the headers of the weights, and checks them against each other.

    Raises `CheckpointError` with everything that is wrong in one message.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    source = directory / "config.json"
    data = read_json(source)
    config, form = parse_config(data, source), parse_form(data, source)
    opened = open_tensors(directory)
    problems = list(opened.problems)
    try:
        table = checkpoint_tensors(config, form)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    known = {spec.name for spec in table}
    strange = sorted(name for name in opened.tensors if name not in known and not is_kv_scale(name))
    other = "_blocks" if form == "bf16" else "_proj"
    if any(".mlp.experts." in name and name.endswith(other) for name in strange):
        said = "has no quantization_config" if form == "bf16" else "says quant_method mxfp4"
        problems.append(f"config.json {said}, but the experts are stored in the other form")
    elif opened.lost is not None:
        found = (_mismatch(spec, opened.tensors.get(spec.name)) for spec in table if spec.name not in opened.lost)
        problems += [problem for problem in found if problem]
        problems += [f"{name} is no tensor of this model" for name in strange]
    kv_scales, wrong = read_kv_scales(opened.tensors, config.num_layers)
    problems += wrong
    if problems:
        raise CheckpointError(f"{directory} cannot be used: {_joined(problems)}")
    return Description(config, form, directory, data, {n: opened.tensors[n] for n in known}, kv_scales)


def load_checkpoint(directory: Path | str, *, dtype: Any = jnp.bfloat16, place: Place | None = None) -> Checkpoint:
    """Reads a gpt-oss or gpt_oss_puzzle checkpoint.

    Args:
      directory: holds config.json and model.safetensors, or shards with an index.
      dtype: of every array but the packed experts.
      place: puts an array where it belongs, given its path in the tree (packed experts: ending in "blocks"
        and "scales"); by default the first device.

    Raises `CheckpointError` with everything that is wrong in one message.
    """
    description = describe_checkpoint(directory)
    place = place or (lambda path, array: jnp.array(array))
    table = checkpoint_tensors(description.config, description.form)
    infinite = [
        f"{spec.name} holds the scale {NOT_A_NUMBER}, which is no number"
        for spec in table
        if spec.path[-1] == "scales" and (description.tensors[spec.name].read() == NOT_A_NUMBER).any()
    ]
    if infinite:
        raise CheckpointError(f"{directory} cannot be used: {_joined(infinite)}")
    leaves = {}
    for spec in table:
        array = description.tensors[spec.name].read()
        if spec.dtype != "U8":
            array = array.astype(jnp.dtype(dtype), copy=False)
        leaves[spec.path] = place(spec.path, np.ascontiguousarray(array.T) if spec.transposed else array)
    return Checkpoint(
        description.config,
        build_params(description.config, leaves),
        description.form,
        description.directory,
        description.config_json,
        description.kv_scales,
    )


def build_params(config: ModelConfig, leaves: Mapping[ParamPath, Any]) -> Params:
    """The parameter tree of leaves by path; pairs of "blocks" and "scales" become `MXFP4`."""
    params: Params = {"layers": [{"attention": {}, "moe": {}} for _ in config.blocks]}
    for path, leaf in leaves.items():
        if path[-1] == "scales":
            continue
        if path[-1] == "blocks":
            path, leaf = path[:-1], MXFP4(leaf, leaves[(*path[:-1], "scales")])
        node: Any = params
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = leaf
    return params


def _mismatch(spec: TensorSpec, stored: StoredTensor | None) -> str:
    """What is wrong with a stored tensor; empty when nothing is."""
    if stored is None:
        return f"{spec.name} is missing"
    if stored.shape != spec.shape:
        return f"{spec.name} has shape {list(stored.shape)}, but config.json asks for {list(spec.shape)}"
    allowed = _FLOATS if spec.dtype == "BF16" else (spec.dtype,)
    if stored.dtype not in allowed:
        return f"{spec.name} is stored as {stored.dtype}, but must be {' or '.join(allowed)}"
    return ""


def _joined(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more problems" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
