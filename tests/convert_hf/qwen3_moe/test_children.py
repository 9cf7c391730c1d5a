"""Children of Qwen3-MoE checkpoints: cut, trained, opened again, refused, and written in spite of kills."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.child_of import load_delta, open_child
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import dotted, tensor_bytes
from puzzle_jax.convert_hf.tensors.files import INDEX, open_tensors
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.model.child import Child, ChildBlock, cut_params, delta_leaves
from tests.convert_hf.checkpoints import assert_trees_equal, rewrite, stored_bytes
from tests.convert_hf.qwen import BF16, STORAGES, read_all, write_all, write_qwen
from tests.convert_hf.qwen3_moe.children import CONFIG, KEPT, ONE_COUNT, bf16, edit, export, storage_of, uniform, view
from tests.convert_hf.test_kills import Killed, killed, killed_at
from tests.support import random_params

ATTENTION = "model.layers.0.self_attn."


def test_a_pruned_expert_keeps_its_bytes_and_the_rest_is_copied(parent, tmp_path):
    before, after = stored_bytes(parent), stored_bytes(export(parent, tmp_path / "child", view()))
    expected = {}
    for name, data in before.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        kept = None if layer in (None, 1) else KEPT[layer]
        stem, _, rest = name.partition(".experts.")
        if kept is not None and (name.endswith("mlp.gate.weight") or name.endswith((".gate_up_proj", "s.down_proj"))):
            rows = open_tensors(parent).tensors[name].read()
            expected[name] = b"".join(rows[expert].tobytes() for expert in kept)
        elif kept is not None and rest:
            expert, _, part = rest.partition(".")
            if int(expert) in kept:
                expected[f"{stem}.experts.{kept.index(int(expert))}.{part}"] = data
        else:
            expected[name] = data
    assert after == expected


def test_the_identity_is_byte_for_byte(parent, tmp_path):
    assert main(["export", "--checkpoint", str(parent), "--out", str(tmp_path / "again")]) == 0
    assert stored_bytes(tmp_path / "again") == stored_bytes(parent)
    data = json.loads((tmp_path / "again" / "config.json").read_text())
    assert data["model_type"] == "qwen3_moe"
    assert data.get("quantization_config") == describe_checkpoint(parent).config_json.get("quantization_config")


def test_cutting_equals_viewing_and_predicted_bytes_are_exported(parent, tmp_path):
    child = view()
    out = export(parent, tmp_path / "child", child)
    cut = load_checkpoint(out)
    assert cut.config == child.config
    assert_trees_equal(cut.params, cut_params(load_checkpoint(parent).params, child))
    assert tensor_bytes(child.config, cut.form) == sum(map(len, stored_bytes(out).values()))
    assert open_child(parent, out, every_expert=True).differing == ()
    card = (out / "README.md").read_text()
    assert "| 0 | 5 of 7 | 5 (was full) |" in card and "| 1 | dense | full |" in card and "gpt" not in card


def test_a_homogeneous_child_is_plain(parent, tmp_path):
    out = export(parent, tmp_path / "child", uniform())
    data = json.loads((out / "config.json").read_text())
    assert data["model_type"] == "qwen3_moe" and data["num_experts"] == data["num_local_experts"] == 3
    assert not {"auto_map", "model_file"} & set(data) and not list(out.glob("*.py"))
    card = (out / "README.md").read_text()
    assert "attention has full attention in all layers" in card and "serves Qwen3-MoE" in card
    assert open_child(parent, out).child == uniform()


def test_code_is_carried(plain, tmp_path):
    out = export(plain, tmp_path / "child", view())
    names = {f"{kind}_qwen3_moe_puzzle.py" for kind in ("configuration", "modeling", "mlx")}
    assert {path.name for path in out.glob("*.py")} == names
    data = json.loads((out / "config.json").read_text())
    assert {f"{reference.split('.')[0]}.py" for reference in data["auto_map"].values()} | {data["model_file"]} == names


def test_a_factor_of_its_own(plain, tmp_path):
    rope = replace(CONFIG.rope, factor=2.0)
    child = uniform(rope=rope)
    out = export(plain, tmp_path / "long", child)
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 2.0
    assert open_child(plain, out).child == child


def trained_delta() -> dict[str, Any]:
    """Trained values of every kind of parameter, with values that a checkpoint can hold."""
    drawn = random_params(CONFIG, seed=9)["layers"]
    return {
        "layers": [
            {"attention": {"q_weight": bf16(drawn[0]["attention"]["q_weight"])}},
            {"moe": {name: bf16(drawn[1]["moe"][name]) for name in ("gate_up", "norm")}},
            {"moe": {name: bf16(drawn[2]["moe"][name]) for name in ("down", "router_weight")}},
            {"attention": {name: bf16(drawn[3]["attention"][name]) for name in ("o_weight", "q_norm")}},
        ],
        "final_norm": bf16(random_params(CONFIG, seed=9)["final_norm"]),
    }


def test_what_was_trained_comes_back_and_exports_to_the_same_bytes(parent, tmp_path):
    trained = delta_leaves(CONFIG, trained_delta())
    child = view(dense_delta=trained_delta())
    out = export(parent, tmp_path / "child", child)
    opened = open_child(parent, out)
    assert opened.child == replace(child, dense_delta=None) and set(opened.differing) == set(map(dotted, trained))
    delta = load_delta(parent, out, opened.differing)
    found = delta_leaves(CONFIG, delta)
    assert set(found) == set(trained)
    for path, leaf in found.items():
        by_expert = path[:3] == ("layers", 2, "moe")
        axis = 1 if path[-1] == "router_weight" else 0
        ids = list(KEPT[2]) if by_expert else slice(None)
        expected, ours = (np.moveaxis(np.asarray(array), axis, 0)[ids] for array in (trained[path], leaf))
        np.testing.assert_array_equal(ours, expected, err_msg=dotted(path))
    again = export(parent, tmp_path / "again", replace(child, dense_delta=delta))
    assert stored_bytes(again) == stored_bytes(out)
    assert_trees_equal(load_checkpoint(out).params, cut_params(load_checkpoint(parent).params, child))


def test_trained_matrices_of_fp8_are_bf16_with_those_that_are_fused_with_them(fp8, tmp_path):
    out = export(fp8, tmp_path / "child", uniform(dense_delta=trained_delta()))
    described, tensors = describe_checkpoint(out), open_tensors(out).tensors
    types = {name: stored.dtype for name, stored in tensors.items() if name.endswith("_proj.weight")}
    plain = {name for name, dtype in types.items() if dtype == "BF16"}
    assert plain == {
        *(f"{ATTENTION}{name}_proj.weight" for name in "qkv"),
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        *(f"model.layers.2.mlp.experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up", "down")),
    }
    assert {name for name, dtype in types.items() if dtype == "F8_E4M3"} == set(types) - plain
    assert {name.removesuffix("_scale_inv") for name in tensors if "scale" in name} == set(types) - plain
    skipped = described.config_json["quantization_config"]["modules_to_not_convert"]
    listed = describe_checkpoint(fp8).config_json["quantization_config"]["modules_to_not_convert"]
    assert skipped[: len(listed)] == listed
    assert set(skipped[len(listed) :]) == {
        *(f"{ATTENTION}{name}_proj" for name in "qkv"),
        "model.layers.3.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.experts",
    }
    # k and v keep their values, rounded; the bytes that are counted for such a child are those on the disk
    k = describe_checkpoint(fp8).tensors[f"{ATTENTION}k_proj.weight"].read()
    np.testing.assert_array_equal(tensors[f"{ATTENTION}k_proj.weight"].read(), k.astype(BF16))
    nbytes = sum(map(len, stored_bytes(out).values()))
    assert tensor_bytes(described.config, "fp8", described.unquantized) == nbytes
    card = (out / "README.md").read_text()
    assert f"{nbytes:,} (" in card and "those that runtimes fuse with them, are in bfloat16" in card
    # a child of the child keeps what is in bf16 as it is
    assert main(["export", "--checkpoint", str(out), "--out", str(tmp_path / "again")]) == 0
    assert stored_bytes(tmp_path / "again") == stored_bytes(out)


def test_trained_values_of_dense_layers_are_checked_before_anything_is_written(plain, tmp_path):
    delta = trained_delta()
    delta["layers"][1]["moe"]["gate_up"][0, 3, 5] = np.nan
    with pytest.raises(ConfigError, match=r"the trained values of layers\.1\.moe\.gate_up are not all finite numbers"):
        export(plain, tmp_path / "child", uniform(dense_delta=delta))
    assert not (tmp_path / "child").exists()


def test_wide_floats_of_the_parent_are_rounded(tmp_path):
    parent = write_qwen(tmp_path / "parent")
    tensors = read_all(parent)
    write_all(parent, {name: array.astype(np.float32) + np.float32(1e-6) for name, array in tensors.items()})
    out = export(parent, tmp_path / "child", uniform())
    wide = read_all(parent)["model.layers.0.mlp.experts.2.up_proj.weight"]
    assert stored_bytes(out)["model.layers.0.mlp.experts.1.up_proj.weight"] == wide.astype(BF16).tobytes()
    assert {stored.dtype for stored in open_tensors(out).tensors.values()} == {"BF16"}
    assert open_child(parent, out, every_expert=True).differing == ()


def test_padding_is_refused_because_nothing_could_keep_the_added_experts_from_being_chosen(plain, tmp_path, capsys):
    out = export(plain, tmp_path / "child", view(windows=(None,) * 4))
    assert main(["export", "--checkpoint", str(out), "--out", str(tmp_path / "pad"), "--pad-experts"]) == 2
    message = capsys.readouterr().err
    assert "routers of Qwen3-MoE have no bias that would keep the added ones from being chosen" in message
    assert not (tmp_path / "pad").exists()
    even = export(plain, tmp_path / "even", uniform())
    assert main(["export", "--checkpoint", str(even), "--out", str(tmp_path / "same"), "--pad-experts"]) == 0
    windowed = export(plain, tmp_path / "windowed", view(ONE_COUNT))
    blocks = describe_checkpoint(windowed).config.blocks
    everything = tuple(ChildBlock(tuple(range(block.num_experts)), block.window) for block in blocks)
    with pytest.raises(ConfigError, match=r"windows are .* but a padded child needs full attention in all layers"):
        child = Child(CONFIG.with_blocks(blocks), everything)
        export(windowed, tmp_path / "no", child, pad_experts=True)
    edit(out, "provenance.json", kept_experts=[[0, 2, 3, 5, 6], [], [1], list(range(7))])
    with pytest.raises(PuzzleError, match=r"keeps 1 experts in layer 2, but config\.json has 2"):
        open_child(plain, out)


def test_another_parent_is_refused(parent, tmp_path):
    out = export(parent, tmp_path / "child", uniform())
    other = write_qwen(tmp_path / "other", storage=storage_of(parent), seed=1)
    with pytest.raises(
        PuzzleError, match=r"child was not cut from .*other: model\.layers\.0\.mlp\.gate\.weight differs"
    ):
        open_child(other, out)
    if storage_of(parent) == "experts":
        name = "model.layers.3.mlp.experts.0.up_proj.weight"  # the sampled row of layer 3 is 3 % 3 = 0
        rewrite(out, **{name: read_all(out)[name] * BF16.type(2)})
        with pytest.raises(PuzzleError, match=r"layers\.3\.mlp\.experts\.gate_up_proj differs in row 0, expert 2 of"):
            open_child(parent, out)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("step", [2, 9, 15, 24])
def test_a_killed_export_goes_on(tmp_path, storage, step):
    parent = write_qwen(tmp_path / "parent", storage=storage)
    options: dict[str, Any] = {"shard_bytes": 60_000}
    whole = export(parent, tmp_path / "whole", uniform(), **options)
    with killed_at(step, killed), pytest.raises(Killed):
        export(parent, tmp_path / "out", uniform(), **options)
    assert not (tmp_path / "out").exists()
    export(parent, tmp_path / "out", uniform(), **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    assert (whole / INDEX).is_file()
