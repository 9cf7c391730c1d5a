import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import DTypeLike

from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import CheckpointError
from puzzle_jax.model.cache_format import KVScales
from tests.convert_hf.checkpoints import MIXED, rewrite, write_random
from tests.support import present, random_params, small_config

CONFIG = small_config()  # four layers
K, V = [0.5, 0.25, 2.0, 1.5], [3.0, 0.125, 1.0, 0.75]
SCALES = KVScales(jnp.asarray(K, jnp.float32), jnp.asarray(V, jnp.float32))


def add(directory: Path, **tensors: np.ndarray) -> Path:
    rewrite(directory, **tensors)
    return directory


def flat(k=K, v=V, shape=(), dtype: DTypeLike = np.float32):
    return {
        f"model.layers.{layer}.self_attn.{kind}_scale": np.full(shape, value, dtype)
        for kind, values in (("k", k), ("v", v))
        for layer, value in enumerate(values)
    }


def nested(shape=()):
    return {
        name.replace("k_scale", "k_proj.k_scale").replace("v_scale", "v_proj.v_scale"): value
        for name, value in flat(shape=shape).items()
    }


@pytest.mark.parametrize("tensors", [flat(), flat(shape=(1,), dtype=np.float16), nested(), nested(shape=(1,))])
def test_all_forms_are_read(tmp_path, tensors):
    directory = add(write_random(tmp_path / "model", CONFIG, "bf16"), **tensors)
    scales = present(load_checkpoint(directory).kv_scales)
    np.testing.assert_array_equal(scales.k, K)
    np.testing.assert_array_equal(scales.v, V)


def test_a_checkpoint_without_scales_has_none(tmp_path):
    assert describe_checkpoint(write_random(tmp_path / "model", CONFIG, "bf16")).kv_scales is None


@pytest.mark.parametrize(
    "change,message",
    [
        ({"model.layers.1.self_attn.k_scale": None}, "model.layers.1.self_attn.k_scale is missing"),
        ({"model.layers.2.self_attn.v_scale": np.zeros((), np.float32)}, "v_scale is 0.0, but a scale must be above 0"),
        ({"model.layers.2.self_attn.v_scale": np.ones(3, np.float32)}, r"F32 of shape \[3\], but a scale is one float"),
        ({"model.layers.2.self_attn.v_scale": np.ones((), np.int32)}, "v_scale is I32 of shape"),
        ({"model.layers.0.self_attn.k_proj.k_scale": np.ones((), np.float32)}, "gives 1.0 for the same layer"),
        ({"model.layers.7.self_attn.k_scale": np.ones((), np.float32)}, "layer 7 has a k_scale, but the model has 4"),
    ],
)
def test_scales_that_make_no_sense_are_refused(tmp_path, change, message):
    tensors = {name: value for name, value in {**flat(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        describe_checkpoint(add(write_random(tmp_path / "model", CONFIG, "bf16"), **tensors))


def header(directory: Path) -> dict:
    data = (directory / "model.safetensors").read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_saved_scales_are_zero_dimensional_floats_and_come_back(tmp_path):
    save_checkpoint(tmp_path / "out", CONFIG, random_params(CONFIG), config_base={}, form="bf16", kv_scales=SCALES)
    entry = header(tmp_path / "out")["model.layers.3.self_attn.v_scale"]
    assert entry["dtype"] == "F32" and entry["shape"] == []
    scales = present(load_checkpoint(tmp_path / "out").kv_scales)
    np.testing.assert_array_equal(scales.k, K)
    np.testing.assert_array_equal(scales.v, V)


@pytest.mark.parametrize("own", [False, True])
def test_a_child_carries_its_own_scales_or_else_its_parents(tmp_path, own):
    parent = add(write_random(tmp_path / "parent", CONFIG, "bf16"), **nested(shape=(1,)))
    config = CONFIG.with_blocks(MIXED)
    kept = [list(range(block.num_experts)) for block in MIXED]
    mine = KVScales(SCALES.k * 2, SCALES.v * 4) if own else None
    export_child(parent, tmp_path / "child", config, kept, provenance={}, kv_scales=mine)
    scales = present(load_checkpoint(tmp_path / "child").kv_scales)
    np.testing.assert_array_equal(scales.k, np.asarray(K) * (2 if own else 1))
    np.testing.assert_array_equal(scales.v, np.asarray(V) * (4 if own else 1))
    assert header(tmp_path / "child")["model.layers.0.self_attn.k_scale"]["shape"] == []


def test_a_plain_child_has_its_scales_on_record_alone(tmp_path):
    parent = add(write_random(tmp_path / "parent", CONFIG, "bf16"), **flat())
    kept = [list(range(block.num_experts)) for block in CONFIG.blocks]
    export_child(parent, tmp_path / "child", CONFIG, kept, provenance={})
    assert describe_checkpoint(tmp_path / "child").kv_scales is None
    assert json.loads((tmp_path / "child" / "provenance.json").read_text())["kv_scales"] == {"k": K, "v": V}
