"""Checkpoints without their weights: config.json and the headers of the files, checked against each other.

Everything is compared with the table of tensors before a byte of weights is read, and all problems are reported
together. Nothing here imports JAX, so that a damaged checkpoint is refused at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.configuration.quantization import Modules, unquantized
from puzzle_jax.convert_hf.kv_scales import StoredScales, is_kv_scale, read_kv_scales
from puzzle_jax.convert_hf.other_forms import CONFIG, check_form
from puzzle_jax.convert_hf.table import Form, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors.files import Stored, StoredTensor, open_tensors, read_json
from puzzle_jax.convert_hf.tensors.layout import SCALES, arrange
from puzzle_jax.convert_hf.token_ids import check_ids
from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.files import Json

PROVENANCE = "provenance.json"
"""The record of a child's origin, beside its tensors."""

_SHOWN = 6


@dataclass(frozen=True)
class Description:
    """A checkpoint without its weights.

    Attributes:
      form: how matrices are stored.
      config_json: the whole content of config.json.
      tensors: its checked tensors by their names in the table.
      kv_scales: scales of an FP8 key-value cache, where the checkpoint carries them.
      unquantized: modules whose matrices are stored in BF16 although the form is "fp8".
    """

    config: ModelConfig
    form: Form
    directory: Path
    config_json: dict[str, Json]
    tensors: Mapping[str, Stored]
    kv_scales: StoredScales | None = None
    unquantized: Modules = field(default_factory=Modules)


def read_config(directory: Path | str) -> ModelConfig:
    """The model that a checkpoint directory (or a config.json) describes; weights need not be there.

    Raises `CheckpointError` where the file is missing or does not describe a model of a known family.
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
    skipped = unquantized(data, source) if form == "fp8" else Modules()
    try:
        table = checkpoint_tensors(config, form, skipped)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from None
    tensors: Mapping[str, Stored] = {}
    if other := _other_form(form, table, opened.tensors):
        problems.append(other)
    elif opened.lost is not None:
        found = arrange(table, opened.tensors, opened.lost)
        tensors, problems = found.tensors, problems + found.problems
        strange = sorted(name for name in opened.tensors if name not in found.used and not is_kv_scale(name))
        problems += [f"{opened.tensors[name].file.name}: {name} is no tensor of this model" for name in strange]
    kv_scales, wrong = read_kv_scales(opened.tensors, config.num_layers)
    problems += wrong
    if problems:
        raise CheckpointError(f"{directory} cannot be used: {joined(problems)}")
    return Description(config, form, directory, data, tensors, kv_scales, skipped)


def _other_form(form: Form, table: Sequence[TensorSpec], files: Mapping[str, StoredTensor]) -> str:
    """A phrase that says so where the tensors are those of another form than that of config.json; empty otherwise."""
    known = {spec.name for spec in table}
    packed = "_proj" if form == "mxfp4" else "_blocks"
    scaled = any(name.endswith(SCALES) for name in files)
    if any(".mlp.experts." in name and name.endswith(packed) and name not in known for name in files):
        found = f"quant_method {form}" if form == "mxfp4" else "no quantization_config"
        return f"config.json has {found}, but the experts are stored in the other form"
    if scaled and form != "fp8":
        return f"config.json has no quantization_config, but there are scales of matrices in FP8 (...{SCALES})"
    if form == "fp8" and not scaled and any(spec.dtype == "F8_E4M3" for spec in table):
        return f"config.json has quant_method fp8, but no matrix has scales (...{SCALES})"
    return ""


def joined(problems: Sequence[str]) -> str:
    """The first few problems and the number of the others, as the end of a sentence."""
    more = f"; and {len(problems) - _SHOWN} more problems" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
