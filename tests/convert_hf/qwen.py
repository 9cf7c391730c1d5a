"""Random Qwen3-MoE checkpoints on disk, in every form that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig, RopeConfig
from puzzle_jax.convert_hf.tensors.files import SINGLE, open_tensors
from puzzle_jax.convert_hf.tensors.writer import PlannedTensor, write_file
from tests.convert_hf.checkpoints import write_random
from tests.support import small_config

Storage = Literal["experts", "fused", "fp8"]
STORAGES: tuple[Storage, ...] = ("experts", "fused", "fp8")
BLOCKS = (BlockConfig(7), BlockConfig(0), BlockConfig(7), BlockConfig(7))
BLOCK = 128
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def qwen_config(blocks: tuple[BlockConfig, ...] = BLOCKS, **changes: object) -> ModelConfig:
    """Hidden 136, intermediate 24, heads 6 on 3 of 22, dense layers of 130: one block of FP8 and a part of another."""
    settings: dict[str, object] = dict(
        hidden_size=136,
        head_dim=22,
        dense_size=130 if any(block.num_experts == 0 for block in blocks) else None,
        rope=RopeConfig(theta=10_000.0, factor=1.0, original_context=512, truncate=True),
        swiglu_limit=None,
        rms_norm_eps=1e-6,
        variant=QWEN3_MOE,
    )
    return small_config(blocks, **{**settings, **changes})


def write_qwen(
    directory: Path,
    config: ModelConfig | None = None,
    storage: Storage = "experts",
    *,
    seed: int = 0,
    **options: object,
) -> Path:
    """Saves a random model and returns its directory."""
    config = qwen_config() if config is None else config
    write_random(directory, config, "bf16", seed=seed, **options)
    if storage == "fused":
        to_fused(directory)
    if storage == "fp8":
        to_fp8(directory)
    return directory


def to_fused(directory: Path) -> None:
    """Stacks the experts of a single-file checkpoint as transformers 5 holds them."""
    tensors = read_all(directory)
    stems = {name.partition(".experts.")[0] + ".experts" for name in tensors if ".experts." in name}
    for stem in stems:
        names = [name for name in tensors if name.startswith(f"{stem}.")]
        experts = range(1 + max(int(name[len(stem) + 1 :].split(".")[0]) for name in names))
        taken = {name: tensors.pop(name) for name in names}
        one = {
            part: np.stack([taken[f"{stem}.{expert}.{part}_proj.weight"] for expert in experts])
            for part in ("gate", "up", "down")
        }
        tensors[f"{stem}.gate_up_proj"] = np.concatenate([one["gate"], one["up"]], axis=1)
        tensors[f"{stem}.down_proj"] = one["down"]
    write_all(directory, tensors)


def to_fp8(directory: Path, scale_dtype: np.dtype = BF16) -> None:
    """Quantises attention, experts and dense layers of a single-file checkpoint in blocks, as Qwen3's FP8 forms are."""
    tensors = read_all(directory)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(tensors[name].astype(np.float32), scale_dtype)
    write_all(directory, tensors)
    path = directory / "config.json"
    data = json.loads(path.read_text())
    layers = range(data["num_hidden_layers"])
    data["quantization_config"] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in layers)],
    }
    path.write_text(json.dumps(data))


def quantised(matrix: np.ndarray, scale_dtype: np.dtype = BF16) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of a matrix."""
    codes = np.empty(matrix.shape, E4M3)
    scales = np.empty([-(-size // BLOCK) for size in matrix.shape], scale_dtype)
    for row, column in np.ndindex(*scales.shape):
        place = np.s_[row * BLOCK : (row + 1) * BLOCK, column * BLOCK : (column + 1) * BLOCK]
        scales[row, column] = np.abs(matrix[place]).max() / 400
        codes[place] = (matrix[place] / np.float32(scales[row, column])).astype(E4M3)
    return codes, scales


def read_all(directory: Path) -> dict[str, np.ndarray]:
    return {name: stored.read() for name, stored in open_tensors(directory).tensors.items()}


def write_all(directory: Path, tensors: dict[str, np.ndarray]) -> None:
    names = {np.dtype(np.float32): "F32", BF16: "BF16", np.dtype(np.float16): "F16", E4M3: "F8_E4M3"}
    write_file(
        directory / SINGLE,
        [PlannedTensor(name, names[array.dtype], array.shape, lambda a=array: [a]) for name, array in tensors.items()],
    )
