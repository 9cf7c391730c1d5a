import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.export import CARRIED, export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import Form, checkpoint_tensors, tensor_bytes
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, open_tensors
from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_jax.model.child import Child, ChildBlock, cut_params
from puzzle_jax.model.network import forward, to_compute
from tests.convert_hf.checkpoints import (
    assert_trees_equal,
    names,
    packable_config,
    rewrite,
    rows,
    stored_bytes,
    write_random,
)
from tests.support import present, random_params, random_tokens

KEPT = ((0, 2, 3, 5, 6), (0, 1, 2, 3, 4, 5, 6), (1, 4), (0, 5, 6))
WINDOWS = (5, 9, 5, None)


def mixed_child(parent: ModelConfig) -> Child:
    return Child(parent, tuple(map(ChildBlock, KEPT, WINDOWS)))


def export_mixed(parent: Path, out: Path, **options) -> Child:
    child = mixed_child(packable_config())
    export_child(parent, out, child.config, child.kept, provenance={"seed": 7}, **options)
    return child


@pytest.fixture(params=["mxfp4", "bf16"])
def parent(request, tmp_path) -> Path:
    return write_random(tmp_path / "parent", packable_config(), request.param)


def form_of(directory: Path) -> Form:
    return "mxfp4" if any(name.endswith("_blocks") for name in open_tensors(directory).tensors) else "bf16"


def test_a_pruned_expert_keeps_its_bytes_and_the_rest_is_copied(parent, tmp_path):
    child = export_mixed(parent, tmp_path / "child")
    before, after = stored_bytes(parent), stored_bytes(tmp_path / "child")
    assert set(after) == set(before) == names(child.config, form_of(parent))
    for spec in checkpoint_tensors(child.config, form_of(parent)):
        if ".mlp.experts." in spec.name or ".mlp.router." in spec.name:
            parents = rows(parent, spec.name)
            assert rows(tmp_path / "child", spec.name) == [parents[i] for i in KEPT[present(spec.layer)]], spec.name
        else:
            assert after[spec.name] == before[spec.name], spec.name


def test_predicted_bytes_are_exported_bytes(parent, tmp_path):
    child = export_mixed(parent, tmp_path / "child")
    exported = sum(map(len, stored_bytes(tmp_path / "child").values()))
    assert exported == tensor_bytes(child.config, form_of(parent))
    assert exported < tensor_bytes(child.parent, form_of(parent))


def test_cutting_equals_viewing(parent, tmp_path):
    child = export_mixed(parent, tmp_path / "child")
    tokens = random_tokens(child.parent, 2, 24)
    whole = load_checkpoint(parent, dtype=jnp.float32)
    cut = load_checkpoint(tmp_path / "child", dtype=jnp.float32)
    assert cut.config == child.config

    def run(params, config, **view):
        compiled = jax.jit(lambda params: forward(to_compute(params, jnp.float32), config, tokens, **view))
        return np.asarray(compiled(params))

    masks, windows = child.view
    by_row = [jnp.broadcast_to(window, (2,)) for window in windows]
    viewed = run(whole.params, child.parent, expert_masks=list(masks), windows=by_row)
    exported = run(cut.params, child.config)
    np.testing.assert_allclose(exported, viewed, atol=1e-5 * np.abs(viewed).max())
    # and both differ from the parent, so that the comparison means something
    assert np.abs(run(whole.params, child.parent) - viewed).max() > 0.05 * np.abs(viewed).max()
    assert_trees_equal(cut.params, cut_params(whole.params, child))


@pytest.mark.parametrize("name", [SINGLE, INDEX, "../x", "sub/x"])
def test_no_file_is_written_over_weights_or_elsewhere(tmp_path, name):
    options = {"config_base": {}, "extra_files": {name: b""}}
    with pytest.raises(PuzzleError, match="is no name of a file beside the weights"):
        save_checkpoint(tmp_path / "out", packable_config(), random_params(packable_config()), **options)
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_nested_too_deeply_to_be_written_again(tmp_path):
    deep: list = []
    for _ in range(20_000):  # Python 3.13 writes more than twice the depth that 3.11 does
        deep = [deep]
    with pytest.raises(CheckpointError, match=r"config\.json holds a value that is nested too deeply"):
        save_checkpoint(tmp_path / "out", packable_config(), {}, config_base={"note": deep})


def test_provenance_and_carried_files(parent, tmp_path):
    for name in CARRIED[:-1]:
        (parent / name).write_text(f"content of {name}")
    export_mixed(parent, tmp_path / "child")
    record = json.loads((tmp_path / "child" / "provenance.json").read_text())
    assert record["seed"] == 7 and record["trained"] == []
    assert record["kept_experts"] == [list(ids) for ids in KEPT] and record["windows"] == list(WINDOWS)
    for name in CARRIED[:-1]:
        assert (tmp_path / "child" / name).read_text() == f"content of {name}"
    assert not (tmp_path / "child" / "LICENSE").exists()
    data = json.loads((tmp_path / "child" / "config.json").read_text())
    assert data["eos_token_id"] == 3 and data["model_type"] == "gpt_oss_puzzle"
    for module in {reference.split(".")[0] for reference in data["auto_map"].values()}:
        assert (tmp_path / "child" / f"{module}.py").is_file()
    assert (tmp_path / "child" / data["model_file"]).is_file()


def test_a_homogeneous_child_is_plain_gpt_oss(tmp_path):
    parent = write_random(tmp_path / "parent", packable_config())
    config = packable_config(tuple(BlockConfig(3, block.window) for block in packable_config().blocks))
    export_child(parent, tmp_path / "child", config, [(1, 2, 6)] * 4, provenance={})
    data = json.loads((tmp_path / "child" / "config.json").read_text())
    assert data["model_type"] == "gpt_oss" and data["num_local_experts"] == 3
    assert not {"auto_map", "model_file"} & set(data) and not list((tmp_path / "child").glob("*.py"))


def test_trained_values_replace_the_parents(parent, tmp_path):
    config = packable_config()
    trained = random_params(config, seed=9)
    delta = {
        "embedding": None,
        "layers": [
            None,
            {"attention": {"q_weight": trained["layers"][1]["attention"]["q_weight"]}},
            None,
            None,
        ],
        "final_norm": trained["final_norm"],
        "head": trained["head"],
    }
    export_mixed(parent, tmp_path / "child", dense_delta=delta)
    before, after = stored_bytes(parent), stored_bytes(tmp_path / "child")
    expected = {
        "model.layers.1.self_attn.q_proj.weight": trained["layers"][1]["attention"]["q_weight"].T,
        "model.norm.weight": trained["final_norm"],
        "lm_head.weight": trained["head"].T,
    }
    for name, value in expected.items():
        assert after[name] == np.asarray(value.astype(jnp.bfloat16)).tobytes() != before[name], name
    same = "model.layers.1.self_attn.k_proj.weight"
    assert after[same] == before[same]
    record = json.loads((tmp_path / "child" / "provenance.json").read_text())
    assert record["trained"] == ["final_norm", "head", "layers.1.attention.q_weight"]


def test_a_sharded_parent_and_a_sharded_child(tmp_path):
    config = packable_config()
    one = write_random(tmp_path / "one", config)
    many = write_random(tmp_path / "many", config, shard_bytes=30_000)
    export_mixed(one, tmp_path / "child_of_one", shard_bytes=25_000)
    export_mixed(many, tmp_path / "child_of_many")
    assert (tmp_path / "child_of_one" / INDEX).is_file() and (tmp_path / "child_of_many" / SINGLE).is_file()
    assert stored_bytes(tmp_path / "child_of_one") == stored_bytes(tmp_path / "child_of_many")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "many", "child_of_one", "child_of_many"}


def test_wide_floats_of_the_parent_are_rounded(tmp_path):
    parent = write_random(tmp_path / "parent", packable_config())
    norm = np.linspace(0.1, 2, 96, dtype=np.float32)
    rewrite(parent, **{"model.norm.weight": norm})
    export_mixed(parent, tmp_path / "child")
    after = stored_bytes(tmp_path / "child")
    assert after["model.norm.weight"] == norm.astype(jnp.bfloat16).tobytes()


def test_packed_parameters_are_written_as_they_are(tmp_path):
    first = write_random(tmp_path / "first", packable_config())
    # Every code is small for its scale, so encoding again would give other bytes for the same values.
    scales = np.array(open_tensors(first).tensors["model.layers.0.mlp.experts.down_proj_scales"].read())
    loaded = load_checkpoint(first)
    params = loaded.params
    codes = jnp.full_like(params["layers"][0]["moe"]["down"].codes, 0x11)  # every value 0.5 of its scale
    down = type(params["layers"][0]["moe"]["down"])(codes, jnp.asarray(scales))
    params["layers"][0]["moe"]["down"] = down
    save_checkpoint(tmp_path / "second", loaded.config, params, config_base=loaded.config_json)
    after = stored_bytes(tmp_path / "second")
    assert after["model.layers.0.mlp.experts.down_proj_blocks"] == np.asarray(codes).tobytes()
    assert after["model.layers.0.mlp.experts.down_proj_scales"] == scales.tobytes()
    changed = {"model.layers.0.mlp.experts.down_proj_blocks"}
    before = stored_bytes(first)
    assert {name for name in before if before[name] != after[name]} == changed


def test_unpacking_keeps_values(tmp_path):
    packed = load_checkpoint(write_random(tmp_path / "packed", packable_config()), dtype=jnp.bfloat16)
    save_checkpoint(tmp_path / "dense", packed.config, packed.params, config_base=packed.config_json, form="bf16")
    dense = load_checkpoint(tmp_path / "dense")
    assert dense.form == "bf16" and "quantization_config" not in dense.config_json
    assert_trees_equal(dense.params, to_compute(packed.params, jnp.bfloat16))


def test_extra_files_are_written(tmp_path):
    write_random(tmp_path / "model", packable_config(), extra_files={"tokenizer.json": b"{}", "LICENSE": b"free"})
    assert (tmp_path / "model" / "LICENSE").read_bytes() == b"free"
    assert not (tmp_path / "model" / "provenance.json").exists()


def test_other_directories_are_left_alone(parent, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    export_mixed(parent, other)  # empty: allowed
    assert (other / "config.json").is_file()
    with pytest.raises(PuzzleError, match=r"thesis holds an earlier child; .*allow replacing"):
        export_mixed(parent, other)
    (other / "provenance.json").unlink()
    (other / "notes.txt").write_text("years of work")
    before = stored_bytes(other)
    for replace in (False, True):
        with pytest.raises(PuzzleError, match=r"thesis exists and holds something else"):
            export_mixed(parent, other, replace=replace)
    assert stored_bytes(other) == before and (other / "notes.txt").read_text() == "years of work"
    with pytest.raises(PuzzleError, match="is the parent itself"):
        export_mixed(parent, parent, replace=True)
    file = tmp_path / "file"
    file.write_text("content")
    with pytest.raises(PuzzleError, match="file exists and holds something else"):
        export_mixed(parent, file)


def test_an_earlier_child_is_replaced_whole(parent, tmp_path):
    child = tmp_path / "child"
    export_mixed(parent, child, shard_bytes=20_000)
    config = packable_config(tuple(BlockConfig(2, block.window) for block in packable_config().blocks))
    export_child(parent, child, config, [(0, 1)] * 4, provenance={}, replace=True)
    assert load_checkpoint(child).config == config
    assert not (child / INDEX).exists() and not list(child.glob("*.py"))
    assert {path.name for path in tmp_path.iterdir()} == {"parent", "child"}


def test_misfits_are_refused_before_anything_is_written(parent, tmp_path):
    child, out = mixed_child(packable_config()), tmp_path / "child"

    def attempt(config=child.config, kept=KEPT):
        export_child(parent, out, config, kept, provenance={})

    with pytest.raises(ConfigError, match="layer 2 keeps 3 experts, but the child has num_experts 2"):
        attempt(kept=(*KEPT[:2], (1, 4, 5), KEPT[3]))
    with pytest.raises(ConfigError, match=r"layer 2 keeps \[1, 7\], but needs distinct ids below 7"):
        attempt(kept=(*KEPT[:2], (1, 7), KEPT[3]))
    with pytest.raises(ConfigError, match=r"layer 2 keeps \[1, 1\]"):
        attempt(kept=(*KEPT[:2], (1, 1), KEPT[3]))
    with pytest.raises(ConfigError, match="kept experts are given for 3"):
        attempt(kept=KEPT[:3])
    with pytest.raises(ConfigError, match="head_dim is 12 in the child, 10 in the parent"):
        attempt(config=packable_config(child.config.blocks, head_dim=12))
    (parent / SINGLE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut short"):
        attempt()
    assert not out.exists()
