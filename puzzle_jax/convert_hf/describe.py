"""Checkpoints without their weights: config.json and the headers of the files, checked against each other.

Everything is compared with the table of tensors before a byte of weights is read, and all problems are reported
together. Nothing here imports JAX, so that a damaged checkpoint is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.kv_scales import StoredScales, is_kv_scale, read_kv_scales
from puzzle_jax.convert_hf.other_forms import CONFIG, check_form
from puzzle_jax.convert_hf.table import Form, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors.files import StoredTensor, open_tensors, read_json
from puzzle_jax.convert_hf.token_ids import check_ids
from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.files import Json

PROVENANCE = "provenance.json"
"""The record of a child's origin, beside its tensors."""

_FLOATS = ("BF16", "F16", "F32")
_SHOWN = 6


@dataclass(frozen=True)
class Description:
    """A checkpoint without its weights.

    Attributes:
      form: how the experts are stored.
      config_json: the whole content of config.json.
      tensors: its checked tensors by name.
      kv_scales: scales of an FP8 key-value cache, where the checkpoint carries them.
    """

    config: ModelConfig
    form: Form
    directory: Path
    config_json: dict[str, Json]
    tensors: Mapping[str, StoredTensor]
    kv_scales: StoredScales | None = None


def read_config(directory: Path | str) -> ModelConfig:
    """The model that a checkpoint directory (or a config.json) describes; weights need not be there.

    Raises `CheckpointError` where the file is missing or does not describe a gpt-oss model.
    """
    path = config_path(Path(directory))
    return parse_config(read_json(path), path)


def config_path(path: Path) -> Path:
    """The config.json that a path names, by itself or by its directory.

    Raises `CheckpointError` for a directory that is no checkpoint.
    """
    if path.suffix == ".json":
        return path
    check_form(path, weights=False)
    return path / CONFIG


def describe_checkpoint(directory: Path | str) -> Description:
    """Reads config.json and the headers of the weights, and checks them against each other.

    Raises `CheckpointError` with everything that is wrong in one message.
    """
    directory = Path(directory)
    check_form(directory, weights=False)
    source = directory / CONFIG
    data = read_json(source)
    config, form = parse_config(data, source), parse_form(data, source)
    check_ids(data, source, config.vocab_size)
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
        found = "no quantization_config" if form == "bf16" else "quant_method mxfp4"
        problems.append(f"config.json has {found}, but the experts are stored in the other form")
    elif opened.lost is not None:
        found = (_mismatch(spec, opened.tensors.get(spec.name)) for spec in table if spec.name not in opened.lost)
        problems += [problem for problem in found if problem]
        problems += [f"{opened.tensors[name].file.name}: {name} is no tensor of this model" for name in strange]
    kv_scales, wrong = read_kv_scales(opened.tensors, config.num_layers)
    problems += wrong
    if problems:
        raise CheckpointError(f"{directory} cannot be used: {joined(problems)}")
    return Description(config, form, directory, data, {n: opened.tensors[n] for n in known}, kv_scales)


def _mismatch(spec: TensorSpec, stored: StoredTensor | None) -> str:
    """The faults of a stored tensor; empty if it has none."""
    if stored is None:
        return f"{spec.name} is missing"
    if stored.shape != spec.shape:
        found, wanted = list(stored.shape), list(spec.shape)
        return f"{stored.file.name}: {spec.name} has shape {found}, but config.json asks for {wanted}"
    allowed = _FLOATS if spec.dtype == "BF16" else (spec.dtype,)
    if stored.dtype not in allowed:
        return f"{stored.file.name}: {spec.name} is stored as {stored.dtype}, but must be {' or '.join(allowed)}"
    return ""


def joined(problems: Sequence[str]) -> str:
    """The first few problems and the number of the others, as the end of a sentence."""
    more = f"; and {len(problems) - _SHOWN} more problems" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
