"""Random checkpoints on disk for tests of import, export and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.convert_hf.table import Form, checkpoint_tensors
from puzzle_jax.convert_hf.tensors.files import DTYPES, SINGLE, open_tensors
from puzzle_jax.convert_hf.tensors.writer import PlannedTensor, write_file
from tests.support import random_params, small_config

MIXED = (BlockConfig(5, 9), BlockConfig(7, None), BlockConfig(4, 5), BlockConfig(3, 9))
BASE = {"eos_token_id": 3, "pad_token_id": 1, "note": "kept"}


def packable_config(blocks: tuple[BlockConfig, ...] | None = None, **changes: object) -> ModelConfig:
    """`small_config` with dimensions that are multiples of MXFP4's group: hidden 96, intermediate 64."""
    changes = {"hidden_size": 96, "intermediate_size": 64, **changes}
    return small_config(**({} if blocks is None else {"blocks": blocks}), **changes)  # type: ignore[arg-type]


def write_random(
    directory: Path, config: ModelConfig, form: Form = "mxfp4", *, seed: int = 0, **options: object
) -> Path:
    """Saves a random model of `config` and returns its directory."""
    base = {**BASE, "hidden_act": "silu"}
    params = random_params(config, seed)
    save_checkpoint(directory, config, params, config_base=base, form=form, **options)  # type: ignore[arg-type]
    return directory


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """Bytes of every tensor, by name."""
    opened = open_tensors(directory)
    assert not opened.problems
    return {name: tensor.read().tobytes() for name, tensor in opened.tensors.items()}


def rewrite(directory: Path, **changes: np.ndarray | None) -> None:
    """Replaces or adds tensors of a single-file checkpoint; None removes one."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors: dict[str, Any] = {name: stored.read() for name, stored in open_tensors(directory).tensors.items()}
    write_file(
        directory / SINGLE,
        [
            PlannedTensor(name, names[array.dtype], array.shape, lambda array=array: [array])
            for name, array in {**tensors, **changes}.items()
            if array is not None
        ],
    )


def rows(directory: Path, name: str) -> list[bytes]:
    """The bytes of each slice of a tensor along its first axis."""
    return [row.tobytes() for row in np.asarray(open_tensors(directory).tensors[name].read())]


def assert_trees_equal(left: Any, right: Any) -> None:
    """Asserts equal structure and equal values in every leaf."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for path, leaf in jax.tree.leaves_with_path(left):
        other = dict(jax.tree.leaves_with_path(right))[path]
        np.testing.assert_array_equal(leaf, other, err_msg=jax.tree_util.keystr(path))


def names(config: ModelConfig, form: Form) -> set[str]:
    return {spec.name for spec in checkpoint_tensors(config, form)}
