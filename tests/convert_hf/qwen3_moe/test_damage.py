"""Damaged Qwen3-MoE checkpoints are refused by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.tensors.files import INDEX
from puzzle_jax.errors import CheckpointError
from puzzle_jax.model.child import Child, ChildBlock
from tests.convert_hf.qwen import BF16, E4M3, read_all, write_all, write_qwen
from tests.convert_hf.qwen3_moe.children import CONFIG, edit, export

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
Q = "model.layers.3.self_attn.q_proj.weight"


def damaged(change: Any) -> Any:
    def damage(directory: Path) -> None:
        tensors = read_all(directory)
        change(tensors)
        write_all(directory, tensors)

    return damage


def quantization(**changes: Any) -> Any:
    def damage(directory: Path) -> None:
        data = json.loads((directory / "config.json").read_text())
        edit(directory, "config.json", quantization_config={**data.get("quantization_config", {}), **changes})

    return damage


BAD = {
    "an expert's tensor is missing": ("experts", damaged(lambda t: t.pop(EXPERT)), rf"{EXPERT} is missing$"),
    "a wrong shape": (
        "experts",
        damaged(lambda t: t.update({EXPERT: t[EXPERT].T.copy()})),
        rf"model.safetensors: {EXPERT} has shape \[136, 24\], but config.json asks for \[24, 136\]",
    ),
    "a wrong type": (
        "experts",
        damaged(lambda t: t.update({EXPERT: t[EXPERT].astype(E4M3)})),
        rf"{EXPERT} is stored as F8_E4M3, but must be BF16 or F16 or F32",
    ),
    "one expert of another type": (
        "experts",
        damaged(lambda t: t.update({EXPERT: t[EXPERT].astype(np.float32)})),
        rf"{EXPERT} is stored as F32, but model.layers.2.mlp.experts.0.gate_proj.weight as BF16; all experts",
    ),
    "an expert too many": (
        "experts",
        damaged(lambda t: t.update({EXPERT.replace(".3.", ".7."): t[EXPERT]})),
        r"model.layers.2.mlp.experts.7.up_proj.weight is no tensor of this model",
    ),
    "more experts in config.json": (
        "experts",
        lambda d: edit(d, "config.json", num_experts=8, num_local_experts=8),
        r"model.layers.0.mlp.gate.weight has shape \[7, 136\].*experts.7.gate_proj.weight is missing",
    ),
    "biases in config.json": (
        "experts",
        lambda d: edit(d, "config.json", attention_bias=True),
        r"model.layers.0.self_attn.q_proj.bias is missing",
    ),
    "another dense layer": (
        "experts",
        lambda d: edit(d, "config.json", mlp_only_layers=[0, 1]),
        r"model.layers.0.mlp.gate_proj.weight is missing.*experts.0.down_proj.weight is no tensor",
    ),
    "fused of a wrong shape": (
        "fused",
        damaged(lambda t: t.update({"model.layers.0.mlp.experts.down_proj": np.zeros((7, 24, 136), BF16)})),
        r"experts.down_proj has shape \[7, 24, 136\], but config.json asks for \[7, 136, 24\]",
    ),
    "scales without quantisation in config.json": (
        "fp8",
        lambda d: edit(d, "config.json", quantization_config=None),
        r"config.json has no quantization_config, but there are scales of matrices in FP8",
    ),
    "quantisation in config.json alone": (
        "experts",
        quantization(quant_method="fp8", weight_block_size=[128, 128]),
        r"config.json has quant_method fp8, but no matrix has scales",
    ),
    "scales are missing": ("fp8", damaged(lambda t: t.pop(f"{Q}_scale_inv")), rf"{Q}_scale_inv is missing$"),
    "scales of a wrong shape": (
        "fp8",
        damaged(lambda t: t.update({f"{Q}_scale_inv": t[f"{Q}_scale_inv"][:1]})),
        rf"{Q}_scale_inv has shape \[1, 2\], but config.json asks for \[2, 2\]",
    ),
    "codes that are integers": (
        "fp8",
        damaged(lambda t: t.update({Q: t[Q].astype(np.float32)})),
        rf"{Q} is stored as F32, but must be F8_E4M3",
    ),
    "a module that is said to be in bf16": (
        "fp8",
        quantization(modules_to_not_convert=["model.layers.3.self_attn.q_proj"]),
        rf"{Q} is stored as F8_E4M3, but must be BF16 or F16 or F32",
    ),
    "fused in fp8": (
        "fp8",
        damaged(lambda t: t.update({"model.layers.0.mlp.experts.down_proj": np.zeros((7, 136, 24), E4M3)})),
        r"model.layers.0.mlp.experts.down_proj holds all experts of a layer, which in FP8 is not supported",
    ),
}


@pytest.mark.parametrize("storage, damage, message", BAD.values(), ids=BAD.keys())
def test_damage_is_named(tmp_path, storage, damage, message):
    directory = write_qwen(tmp_path / "model", storage=storage)
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        describe_checkpoint(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


NOT_FINITE = {
    "experts": (EXPERT, np.float32(np.inf), f"{EXPERT} holds values that are not finite"),
    "fused": ("model.layers.2.mlp.experts.down_proj", np.float32(np.nan), "experts.down_proj holds values that are"),
    "fp8 scale": (f"{EXPERT}_scale_inv", np.float32(np.nan), f"{EXPERT}_scale_inv holds values that are not finite"),
    "fp8": (Q, np.float32(np.nan), f"{Q} holds values that are not finite"),
}


@pytest.mark.parametrize("storage", NOT_FINITE)
def test_values_that_are_not_finite_are_refused_when_read_or_copied(tmp_path, storage):
    directory = write_qwen(tmp_path / "model", storage=storage.split()[0])
    name, value, message = NOT_FINITE[storage]
    tensors = read_all(directory)
    tensors[name].reshape(-1)[-1] = value
    write_all(directory, tensors)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory)
    everything = tuple(ChildBlock(tuple(range(block.num_experts)), 5) for block in CONFIG.blocks)
    with pytest.raises(CheckpointError, match=message):
        export(directory, tmp_path / "child", Child(CONFIG, everything))
    assert not (tmp_path / "child").exists()


def test_a_shard_that_is_gone_is_the_only_problem(tmp_path):
    directory = write_qwen(tmp_path / "model", shard_bytes=60_000)
    first, *_ = sorted(directory.glob("*.safetensors"))
    shutil.move(first, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"cannot be used: {first.name} cannot be read \(No such file.*\)$"):
        describe_checkpoint(directory)
    index = json.loads((directory / INDEX).read_text())
    del index["weight_map"][EXPERT]
    (directory / INDEX).write_text(json.dumps(index))
    shutil.move(tmp_path / "elsewhere", first)
    with pytest.raises(CheckpointError, match=rf"cannot be used: {EXPERT} is missing$"):
        describe_checkpoint(directory)
