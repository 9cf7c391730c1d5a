import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from puzzle_jax.convert_hf.describe import read_config
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.convert_hf.tensors import files as tensor_files
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, StoredTensor, open_tensors
from puzzle_jax.convert_hf.tensors.writer import PlannedTensor, write_file
from puzzle_jax.errors import CheckpointError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.sharding import make_mesh, shard_params
from puzzle_jax.model.spec import is_spec, param_specs
from tests.convert_hf.checkpoints import MIXED, assert_trees_equal, packable_config, rewrite, write_random
from tests.support import random_params, small_config


def tensor(directory: Path, name: str) -> np.ndarray:
    return np.array(open_tensors(directory).tensors[name].read())


@pytest.mark.parametrize("config", [small_config(), small_config(MIXED)], ids=["plain", "mixed"])
def test_bf16_round_trip(tmp_path, config):
    loaded = load_checkpoint(write_random(tmp_path / "model", config, "bf16", seed=3))
    assert loaded.config == config and loaded.form == "bf16" and loaded.config_json["note"] == "kept"
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(config, 3))
    assert_trees_equal(loaded.params, expected)
    shapes = jax.tree.map(lambda spec: spec.shape, param_specs(config), is_leaf=is_spec)
    assert jax.tree.map(lambda leaf: leaf.shape, loaded.params) == shapes


def test_packed_experts_stay_packed(tmp_path):
    config = packable_config(MIXED)
    loaded = load_checkpoint(write_random(tmp_path / "model", config), dtype=jnp.float32)
    assert loaded.form == "mxfp4"
    for layer, original in zip(loaded.params["layers"], random_params(config)["layers"], strict=True):
        for name in ("gate_up", "down"):
            packed = layer["moe"][name]
            assert isinstance(packed, MXFP4) and packed.shape == original["moe"][name].shape
            blocks, scales = mxfp4.encode(np.asarray(original["moe"][name]))
            np.testing.assert_array_equal(packed.codes, blocks.reshape(*scales.shape[:2], -1))
            np.testing.assert_array_equal(packed.scales, scales)
        rounded = original["moe"]["router_weight"].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(layer["moe"]["router_weight"], rounded)
    assert loaded.params["head"].dtype == jnp.float32


def test_layout_by_names(tmp_path):
    """Reads single tensors with the safetensors library; they have the orientation that the format prescribes."""
    config = small_config()
    directory = write_random(tmp_path / "model", config, "bf16")
    params = random_params(config)
    moe, attention = params["layers"][2]["moe"], params["layers"][2]["attention"]
    expected = {
        "model.layers.2.self_attn.q_proj.weight": attention["q_weight"].T,
        "model.layers.2.self_attn.o_proj.weight": attention["o_weight"].T,
        "model.layers.2.self_attn.sinks": attention["sinks"],
        "model.layers.2.mlp.router.weight": moe["router_weight"].T,
        "model.layers.2.mlp.experts.gate_up_proj": moe["gate_up"],
        "model.layers.2.mlp.experts.down_proj": moe["down"],
        "model.layers.2.post_attention_layernorm.weight": moe["norm"],
        "lm_head.weight": params["head"].T,
        "model.embed_tokens.weight": params["embedding"],
    }
    with safe_open(directory / SINGLE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name, value in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), np.asarray(value.astype(jnp.bfloat16)), err_msg=name)


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_shards_hold_the_same_model(tmp_path, form):
    config = packable_config(MIXED)
    whole = load_checkpoint(write_random(tmp_path / "whole", config, form))
    directory = write_random(tmp_path / "shards", config, form, shard_bytes=20_000)
    files = sorted(directory.glob("*.safetensors"))
    assert len(files) > 5 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((directory / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in open_tensors(directory).tensors.values())
    for name, file in index["weight_map"].items():
        if name.endswith("_scales"):
            assert file == index["weight_map"][name.replace("_scales", "_blocks")]
    assert_trees_equal(load_checkpoint(directory).params, whole.params)


def test_wider_floats_are_accepted(tmp_path):
    directory = write_random(tmp_path / "model", small_config(), "bf16")
    name = "model.layers.1.input_layernorm.weight"
    norm = np.linspace(0.1, 2, 40, dtype=np.float32)
    rewrite(directory, **{name: norm, "model.norm.weight": norm.astype(np.float16)})
    params = load_checkpoint(directory, dtype=jnp.float32).params
    np.testing.assert_array_equal(params["layers"][1]["attention"]["norm"], norm)
    np.testing.assert_array_equal(params["final_norm"], norm.astype(np.float16).astype(np.float32))


def test_tensors_at_odd_offsets_are_read(tmp_path):
    directory = write_random(tmp_path / "model", small_config(), "bf16")
    expected = tensor(directory, "lm_head.weight")
    data = (directory / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    (directory / SINGLE).write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    np.testing.assert_array_equal(tensor(directory, "lm_head.weight"), expected)


@pytest.mark.parametrize("data,model", [(2, 3), (1, 7)])
@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
def test_a_mesh_holds_what_one_device_does_where_sharding_says(tmp_path, form, data, model):
    config = packable_config()
    directory = write_random(tmp_path / "model", config, form)
    mesh = make_mesh(data, model)
    loaded = load_checkpoint(directory, dtype=jnp.float32, mesh=mesh)
    one = load_checkpoint(directory, dtype=jnp.float32)
    assert_trees_equal(loaded.params, one.params)
    expected = shard_params(one.params, config, mesh)
    for ours, theirs in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(expected), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    if form == "mxfp4" and model == 7:
        assert loaded.params["layers"][1]["moe"]["down"].codes.addressable_shards[3].data.shape == (1, 96, 32)


def test_dense_experts_on_request(tmp_path):
    config = packable_config(MIXED)
    directory = write_random(tmp_path / "model", config)
    told = {}
    dense = load_checkpoint(directory, experts="dense", on_tensor=told.__setitem__)
    assert_trees_equal(dense.params, to_compute(load_checkpoint(directory).params, jnp.bfloat16))
    assert sum(told.values()) == tensor_bytes(config, "mxfp4") and len(told) == 3 + config.num_layers * 19


@pytest.mark.parametrize(
    "index",
    [
        (),
        (slice(2, 5),),
        (slice(None), slice(1, 4)),
        (slice(1, 2), slice(0, 5), slice(7, 8)),
        (slice(None), slice(None), slice(3, 3)),
        (slice(0, 6), slice(2, 4), slice(1, 900), slice(0, 2)),
    ],
)
@pytest.mark.parametrize("short_run", [0, 1 << 20])
def test_blocks_of_a_stored_tensor(tmp_path, monkeypatch, index, short_run):
    monkeypatch.setattr(tensor_files, "_SHORT_RUN", short_run)
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", 100_000)
    array = np.arange(6 * 5 * 901 * 3, dtype=np.float32).reshape(6, 5, 901, 3)
    write_file(tmp_path / "x", [PlannedTensor("a", "F32", array.shape, lambda: [array[:2], array[2:]])])
    stored = StoredTensor(
        "a", "F32", array.shape, tmp_path / "x", (tmp_path / "x").stat().st_size - array.nbytes, array.nbytes
    )
    np.testing.assert_array_equal(stored.read(index), array[index])
    assert b"".join(chunk.tobytes() for chunk in stored.chunks()) == array.tobytes()
    found = [piece.tobytes() for piece in stored.bytes_at([(7, 10), (array.nbytes - 4, 4)])]
    assert found == [array.tobytes()[7:17], array.tobytes()[-4:]]


def test_a_process_reads_what_its_devices_hold(tmp_path):
    """Compares the bytes read through system calls, as the kernel counts them."""
    array = np.zeros((64, 64, 4096), np.uint8)
    write_file(tmp_path / "x", [PlannedTensor("a", "U8", array.shape, lambda: [array])])
    stored = StoredTensor("a", "U8", array.shape, tmp_path / "x", 4096, array.nbytes)

    def bytes_read(index):
        before = int(Path("/proc/self/io").read_text().split()[1])
        stored.read(index)
        return int(Path("/proc/self/io").read_text().split()[1]) - before

    for index in ((slice(8, 16),), (slice(None), slice(8, 16)), (slice(8, 16), slice(8, 16))):
        wanted = np.empty(array.shape, bool)[index].size
        assert wanted <= bytes_read(index) < wanted + 4096


def test_read_config_needs_no_weights(tmp_path):
    directory = write_random(tmp_path / "model", small_config(MIXED), "bf16")
    (directory / SINGLE).unlink()
    assert read_config(directory) == read_config(directory / "config.json") == small_config(MIXED)


def cut_short(directory: Path) -> None:
    data = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(data[: len(data) - 100])


def edit_config(directory: Path, **changes: object) -> None:
    data = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**data, **changes}))


def edit_header(directory: Path, name: str, **changes: object) -> None:
    data = (directory / SINGLE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    (directory / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


DOWN = "model.layers.1.mlp.experts.down_proj"
BAD = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config.json cannot be read: No such file"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json cannot be read as JSON"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), r"config.json holds a JSON list"),
    "no weights": (lambda d: (d / SINGLE).unlink(), rf"holds neither {SINGLE} nor {INDEX}"),
    "cut short": (cut_short, r"model.safetensors is cut short: it has \d+ bytes, but .* ends at \d+"),
    "empty": (lambda d: (d / SINGLE).write_bytes(b""), r"is cut short or no safetensors file \(0 bytes\)"),
    "noise": (
        lambda d: (d / SINGLE).write_bytes(b"\1" + bytes(99)),
        r"the header of model.safetensors",
    ),
    "header": (lambda d: edit_header(d, DOWN, shape=[1, -1]), rf"has a damaged entry for {DOWN}"),
    "offsets": (
        lambda d: edit_header(d, DOWN, shape=[7, 2]),
        rf"gives {DOWN} \d+ bytes, which BF16 \[7, 2\]",
    ),
    "type": (lambda d: edit_header(d, DOWN, dtype="Q4"), rf"stores {DOWN} as 'Q4', which is no known type"),
    "missing": (lambda d: rewrite(d, **{DOWN: None}), rf"{DOWN} is missing"),
    "misshaped": (
        lambda d: rewrite(d, **{DOWN: tensor(d, DOWN).swapaxes(1, 2)}),
        rf"{DOWN} has shape \[7, 40, 24\], but config.json asks for \[7, 24, 40\]",
    ),
    "wrong dtype": (
        lambda d: rewrite(d, **{DOWN: tensor(d, DOWN).astype(np.int32)}),
        rf"{DOWN} is stored as I32, but must be BF16 or F16 or F32",
    ),
    "strange": (lambda d: rewrite(d, odd=np.zeros(2, np.float32)), r"odd is no tensor of this model"),
    "other sizes": (lambda d: edit_config(d, head_dim=12), r"q_proj.weight has shape \[60, 40\].*\[72, 40\]"),
    "not packable": (
        lambda d: edit_config(d, quantization_config={"quant_method": "mxfp4"}),
        r"hidden_size is 40, but MXFP4 experts need a multiple of 32",
    ),
}


@pytest.mark.parametrize("damage, message", BAD.values(), ids=BAD.keys())
def test_damage_is_named(tmp_path, damage, message):
    directory = write_random(tmp_path / "model", small_config(), "bf16")
    damage(directory)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(directory)
    assert "\n" not in str(caught.value) and str(directory) in str(caught.value)


def test_no_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        load_checkpoint(tmp_path / "nowhere")


def test_all_problems_are_in_one_message(tmp_path):
    directory = write_random(tmp_path / "model", small_config(), "bf16")
    sinks = np.zeros(10, ml_dtypes.bfloat16)  # of length head_dim instead of the number of heads
    rewrite(directory, **{DOWN: None, "model.layers.0.self_attn.sinks": sinks, "odd": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(directory)
    for part in (
        f"{DOWN} is missing",
        "sinks has shape [10], but config.json asks for [6]",
        "odd is no tensor",
    ):
        assert part in str(caught.value)
    edit_config(directory, hidden_size=41)
    with pytest.raises(CheckpointError, match=r"; and \d\d more problems$"):
        load_checkpoint(directory)


def test_form_and_config_must_agree(tmp_path):
    packed = write_random(tmp_path / "packed", packable_config())
    edit_config(packed, quantization_config=None)
    with pytest.raises(
        CheckpointError, match=r"config\.json has no quantization_config, but the experts are stored in"
    ):
        load_checkpoint(packed)
    dense = write_random(tmp_path / "dense", packable_config(), "bf16")
    edit_config(dense, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"config\.json has quant_method mxfp4, but the experts are stored in"):
        load_checkpoint(dense)


def test_scale_255_is_refused(tmp_path):
    directory = write_random(tmp_path / "model", packable_config())
    name = "model.layers.3.mlp.experts.gate_up_proj_scales"
    scales = tensor(directory, name)
    scales[2, 5, 1] = 255
    rewrite(directory, **{name: scales})
    with pytest.raises(CheckpointError, match=f"{name} holds the scale 255, which is no number"):
        load_checkpoint(directory)


def edit_index(directory: Path, **changes: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update(changes)
    (directory / INDEX).write_text(json.dumps(index))


def test_damaged_indices(tmp_path):
    directory = write_random(tmp_path / "model", small_config(), "bf16", shard_bytes=20_000)
    good = (directory / INDEX).read_text()
    files = sorted(directory.glob("*.safetensors"))

    def message() -> str:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(directory)
        (directory / INDEX).write_text(good)
        return str(caught.value)

    for outside in ("../secret.safetensors", "/etc/passwd", "sub/model.safetensors"):
        edit_index(directory, **{DOWN: outside})
        said = message()
        assert f"{INDEX} names the file {outside!r}, which is outside the directory" in said
        assert "is missing" not in said  # the cause is stated once
    edit_index(directory, **{DOWN: files[0].name})
    assert f"{INDEX} lists {DOWN} in {files[0].name}, which does not hold it" in message()
    (directory / INDEX).write_text("{}")
    assert "has no weight_map" in message()
    (directory / INDEX).write_text('{"weight_map": {"a": 3}}')
    assert "maps a to 3, but must name a file" in message()
    files[1].unlink()
    said = message()
    assert f"{files[1].name} cannot be read (No such file or directory)" in said and "is missing" not in said
