"""Qwen3-MoE checkpoints, expert by expert, fused and in FP8: read, exported as children, opened again, damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from puzzle_jax.config import QWEN3_MOE, BlockConfig, ModelConfig
from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.child_of import load_delta, open_child
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import Form, checkpoint_tensors, dotted, expert_bytes, parameters, tensor_bytes
from puzzle_jax.convert_hf.tensors.files import INDEX, SINGLE, open_tensors
from puzzle_jax.convert_hf.tensors.fingerprint import weights_fingerprint
from puzzle_jax.convert_hf.verify import verify
from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_jax.model.child import Child, ChildBlock, cut_params, delta_leaves
from puzzle_jax.model.sharding import make_mesh
from puzzle_jax.model.spec import count_params
from tests.convert_hf.checkpoints import assert_trees_equal, rewrite, stored_bytes
from tests.convert_hf.qwen import BF16, E4M3, STORAGES, Storage, quantised, qwen_config, read_all, write_all, write_qwen
from tests.convert_hf.test_kills import Killed, killed, killed_at
from tests.support import random_params

CONFIG = qwen_config()
KEPT = ((0, 2, 3, 5, 6), (), (1, 4), tuple(range(7)))
WINDOWS = (5, None, 9, None)
ONE_COUNT = ((1, 2, 6), (), (0, 3, 4), (2, 5, 6))
ATTENTION = "model.layers.0.self_attn."


@pytest.fixture(scope="module", params=STORAGES)
def parent(request, tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "parent", storage=request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    return write_qwen(tmp_path_factory.mktemp("models") / "fp8", storage="fp8")


def storage_of(directory: Path) -> Storage:
    names = stored_bytes(directory)
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    return "fused" if fused else "fp8" if any(name.endswith("_scale_inv") for name in names) else "experts"


def view(kept=KEPT, windows=WINDOWS, **changes: Any) -> Child:
    return Child(CONFIG, tuple(map(ChildBlock, kept, windows)), **changes)


def uniform(**changes: Any) -> Child:
    return view(ONE_COUNT, (None,) * 4, **changes)


def export(parent: Path, out: Path, child: Child, **options: Any) -> Path:
    record = {"seed": 7}
    delta = child.dense_delta
    export_child(parent, out, child.config, child.kept, provenance=record, dense_delta=delta, **options)
    return out


# The table and the files ----------------------------------------------------------------------------------------------


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


def bf16(array: Any) -> np.ndarray:
    return np.asarray(array).astype(BF16).astype(np.float32)


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


# Children -------------------------------------------------------------------------------------------------------------


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


def edit(directory: Path, file: str, **changes: Any) -> None:
    data = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**data, **changes}))


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


# Damage ---------------------------------------------------------------------------------------------------------------

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
