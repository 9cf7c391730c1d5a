"""Qwen3-MoE checkpoints, expert by expert, fused and in FP8: their tensors by name, their bytes, and what they hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig
from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import Form, checkpoint_tensors, expert_bytes, parameters, tensor_bytes
from puzzle_jax.convert_hf.tensors.files import SINGLE
from puzzle_jax.convert_hf.tensors.fingerprint import weights_fingerprint
from puzzle_jax.convert_hf.verify import verify
from puzzle_jax.errors import CheckpointError, ConfigError
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.model.spec import count_params
from tests.convert_hf.checkpoints import assert_trees_equal, rewrite, stored_bytes
from tests.convert_hf.qwen import BF16, quantised, qwen_config, write_qwen
from tests.convert_hf.qwen3_moe.children import CONFIG, ONE_COUNT, bf16, storage_of, uniform
from tests.support import random_params


def test_layout_by_names(plain):
    """Reads single tensors with the safetensors library; they have the orientation that the format prescribes."""
    params = random_params(CONFIG)
    sparse, dense = params["layers"][2]["moe"], params["layers"][1]["moe"]
    attention = params["layers"][2]["attention"]
    expected = {
        "model.layers.2.self_attn.q_proj.weight": attention["q_weight"].T,
        "model.layers.2.self_attn.k_norm.weight": attention["k_norm"],
        "model.layers.2.mlp.gate.weight": sparse["router_weight"].T,
        "model.layers.2.mlp.experts.5.gate_proj.weight": sparse["gate_up"][5, :, 0::2].T,
        "model.layers.2.mlp.experts.5.up_proj.weight": sparse["gate_up"][5, :, 1::2].T,
        "model.layers.2.mlp.experts.0.down_proj.weight": sparse["down"][0].T,
        "model.layers.1.mlp.gate_proj.weight": dense["gate_up"][0, :, 0::2].T,
        "model.layers.1.mlp.up_proj.weight": dense["gate_up"][0, :, 1::2].T,
        "model.layers.1.mlp.down_proj.weight": dense["down"][0].T,
        "lm_head.weight": params["head"].T,
    }
    with safe_open(plain / SINGLE, framework="numpy") as file:
        for name, value in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), np.asarray(value.astype(jnp.bfloat16)), err_msg=name)
    assert not any(".bias" in name or "sinks" in name or ".router." in name for name in stored_bytes(plain))


QUANTISED = ("gate_up", "down", *(f"{name}_weight" for name in "qkvo"))


def test_every_form_holds_the_model(parent):
    loaded = load_checkpoint(parent, dtype=jnp.float32)
    fp8 = storage_of(parent) == "fp8"
    assert loaded.config == CONFIG and loaded.form == ("fp8" if fp8 else "bf16")
    expected = jax.tree.map(bf16, random_params(CONFIG))
    for layer in expected["layers"] if fp8 else ():
        for part in layer.values():
            part |= {name: dequantised(part[name], name) for name in QUANTISED if name in part}
    assert_trees_equal(loaded.params, expected)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.bfloat16), expected)
    assert_trees_equal(load_checkpoint(parent).params, rounded)


def dequantised(array: np.ndarray, name: str) -> np.ndarray:
    """A parameter as it comes back from FP8, computed matrix by matrix."""

    def one(matrix: np.ndarray) -> np.ndarray:  # [inputs, outputs]
        codes, scales = quantised(matrix.T)
        grid = np.repeat(np.repeat(scales.astype(np.float32), 128, 0), 128, 1)[: codes.shape[0], : codes.shape[1]]
        return (codes.astype(np.float32) * grid).T

    if array.ndim == 2:
        return one(array)
    out, parts = np.empty_like(array), 2 if name == "gate_up" else 1
    for expert, part in np.ndindex(len(array), parts):
        out[expert, :, part::parts] = one(array[expert, :, part::parts])
    return out


@pytest.mark.parametrize("storage", ["experts", "fp8"])
def test_a_mesh_holds_what_one_device_does(tmp_path, storage):
    directory = write_qwen(tmp_path / "model", qwen_config((BlockConfig(7), BlockConfig(7))), storage)
    one = load_checkpoint(directory, dtype=jnp.float32)
    assert_trees_equal(load_checkpoint(directory, dtype=jnp.float32, mesh=make_mesh(1, 7)).params, one.params)


def test_predicted_bytes_are_the_bytes_on_disk(parent):
    form = describe_checkpoint(parent).form
    assert tensor_bytes(CONFIG, form) == sum(map(len, stored_bytes(parent).values()))
    assert parameters(CONFIG) == count_params(CONFIG)
    hidden, inter = 136, 24
    scales = 2 * 3 * (2 * 1)  # three matrices of 2 x 1 blocks, two bytes each
    assert expert_bytes(CONFIG, form) == (3 * hidden * inter + scales if form == "fp8" else 2 * 3 * hidden * inter)
    for name, stored in describe_checkpoint(parent).tensors.items():
        spec = next(spec for spec in checkpoint_tensors(CONFIG, form) if spec.name == name)
        assert stored.nbytes == spec.nbytes and stored.shape == spec.shape, name


def test_forms_of_other_families_are_refused():
    with pytest.raises(ConfigError, match="form is mxfp4, but qwen3_moe is stored as fp8 or bf16"):
        checkpoint_tensors(CONFIG, "mxfp4")
    with pytest.raises(ConfigError, match="form is fp8, but parameters are written as mxfp4 or bf16"):
        save_checkpoint(Path("nowhere"), CONFIG, {}, config_base={}, form="fp8")


def qwen3(layers: int, hidden: int, heads: int, inter: int) -> ModelConfig:
    return replace(
        qwen_config((BlockConfig(128),) * layers),
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inter,
        num_heads=heads,
        num_kv_heads=4,
        head_dim=128,
        experts_per_token=8,
    )


def by_hand(layers: int, hidden: int, heads: int, inter: int) -> tuple[int, int]:
    """Parameters, and bytes of matrices in FP8 with their scales."""
    attention = [(heads * 128, hidden), (512, hidden), (512, hidden), (hidden, heads * 128)]
    expert = [(inter, hidden), (inter, hidden), (hidden, inter)]
    matrices = attention + 128 * expert
    numbers = sum(rows * columns for rows, columns in matrices)
    blocks = sum(rows * columns // 128**2 for rows, columns in matrices)
    rest = 128 * hidden + 2 * hidden + 2 * 128  # router, two norms, norms of queries and keys
    outside = 2 * 151_936 * hidden + hidden  # embedding, head and final norm
    return layers * (numbers + rest) + outside, layers * (numbers + 2 * blocks + 2 * rest) + 2 * outside


@pytest.mark.parametrize(
    "sizes, known", [((48, 2048, 32, 768), 30_532_122_624), ((94, 4096, 64, 1536), 235_093_634_560)]
)
def test_published_models_are_counted_exactly_from_their_configuration(tmp_path, capsys, sizes, known):
    path = tmp_path / "config.json"
    total, scaled = by_hand(*sizes)
    assert total == known
    expected: dict[Form, int] = {"bf16": 2 * total, "fp8": scaled}
    for form, nbytes in expected.items():
        quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        base = {"quantization_config": quantization} if form == "fp8" else {}
        path.write_text(json.dumps(write_config(qwen3(*sizes), base, form=form)))
        assert main(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["form"] == form and found["parameters"] == total
        assert found["checkpoint_bytes"] == nbytes == sum(found["bytes_by_part"].values())
    layers, hidden, _, inter = sizes
    idle = layers * 120 * 3 * hidden * inter + 151_936 * hidden
    assert found["active_parameters"] == total - idle
    assert found["kv_bytes_per_1000_tokens"]["bfloat16"] == layers * 1_000 * 2 * 4 * 128 * 2
    if layers == 48:
        assert 2 * total == 61_064_245_248  # metadata.total_size of the published index


def test_inspection_counts_the_files_own_tensors(parent, capsys):
    assert main(["inspect", str(parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stored = stored_bytes(parent)
    assert found["weights"].startswith(f"{len(stored)} tensors of {sum(map(len, stored.values())):,} bytes in 1 file")
    assert found["dimensions"]["dense_size"] == 130 and found["layers"][1]["num_local_experts"] == 0
    assert found["bytes_by_part"]["dense"] > 0


def test_the_same_model_in_other_files(plain, tmp_path):
    fused = write_qwen(tmp_path / "fused", storage="fused")
    shards = write_qwen(tmp_path / "shards", shard_bytes=100_000)
    assert len(list(shards.glob("*.safetensors"))) > 3
    found = [verify(plain, other, rows=1, length=8) for other in (fused, shards)]
    assert all(one.logit_error == 0 and set(one.tensors.values()) >= {0} and not one.different_tensors for one in found)
    assert len({weights_fingerprint(directory) for directory in (plain, fused, shards)}) == 1
    assert_trees_equal(load_checkpoint(shards).params, load_checkpoint(fused).params)


def test_fp8_differs_from_bf16_by_rounding(plain, fp8):
    found = verify(plain, fp8, rows=1, length=8)
    assert not found.same_function
    # matrices of attention and of experts or dense layers; norms, routers, embedding and head are the same
    assert found.tensors == {"equal": 2 * 4 + 2 * 4 + 3 + 3, "different": 4 * 4 + 2 * 4, "in one alone": 0}
    assert weights_fingerprint(plain) != weights_fingerprint(fp8)


def test_to_orbax_and_back(parent, tmp_path):
    assert main(["import", str(parent), "--out", str(tmp_path / "orbax")]) == 0
    assert main(["export", "--checkpoint", str(tmp_path / "orbax"), "--out", str(tmp_path / "end")]) == 0
    end = describe_checkpoint(tmp_path / "end")
    assert end.form == "bf16" and storage_of(tmp_path / "end") == "experts" and end.config == CONFIG
    assert_trees_equal(load_checkpoint(tmp_path / "end").params, load_checkpoint(parent).params)
    if storage_of(parent) == "experts":
        assert stored_bytes(tmp_path / "end") == stored_bytes(parent)


def test_a_tied_head_has_no_tensor(tmp_path):
    config = qwen_config(variant=replace(QWEN3_MOE, tied_head=True, attention_bias=True))
    directory = write_qwen(tmp_path / "model", config)
    assert "lm_head.weight" not in stored_bytes(directory)
    assert load_checkpoint(directory).config == config
    child = replace(config, blocks=uniform().config.blocks)
    export_child(directory, tmp_path / "child", child, ONE_COUNT, provenance={})
    assert load_checkpoint(tmp_path / "child").config == child
    assert verify(directory, directory, rows=1, length=4).same_function
    rewrite(directory, **{"lm_head.weight": np.zeros((97, 136), BF16)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is no tensor of this model"):
        describe_checkpoint(directory)
