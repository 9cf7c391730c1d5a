"""Opening a child's directory as a view of its parent, and reading back what was trained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.child_of import load_delta, open_child
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.table import dotted
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import open_tensors
from puzzle_jax.errors import CheckpointError, ConfigError, PuzzleError
from puzzle_jax.model.child import Child, ChildBlock, delta_leaves
from tests.convert_hf.checkpoints import packable_config, rewrite, stored_bytes, write_random
from tests.support import of_type, random_params

CONFIG = packable_config()
KEPT = ((0, 2, 3, 5, 6), (0, 1, 2, 3, 4, 5, 6), (1, 4), (0, 5, 6))
WINDOWS = (5, 9, 5, None)
PLAIN_WINDOWS = (5, None, 5, None)
FILES = {"tokenizer.json": b'{"version": "1.0"}'}


def bf16(array: Any) -> np.ndarray:
    """Values as a checkpoint in bfloat16 stores them."""
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)


def view(windows=WINDOWS, **changes) -> Child:
    return Child(CONFIG, tuple(map(ChildBlock, KEPT, windows)), **changes)


def export(parent: Path, out: Path, child: Child, **options) -> Path:
    delta = child.dense_delta
    export_child(parent, out, child.config, child.kept, provenance={"seed": 7}, dense_delta=delta, **options)
    return out


def trained_delta() -> dict[str, Any]:
    """Trained dense weights, one layer's router and one expert matrix, with values that a checkpoint can hold."""
    drawn = random_params(CONFIG, seed=9)
    moe = drawn["layers"][1]["moe"]
    down = mxfp4.decode(*mxfp4.encode(np.asarray(drawn["layers"][2]["moe"]["down"])))
    return {
        "layers": [
            {"attention": {"q_weight": bf16(drawn["layers"][0]["attention"]["q_weight"])}},
            {"moe": {"router_weight": bf16(moe["router_weight"]), "router_bias": bf16(moe["router_bias"])}},
            {"moe": {"down": down, "down_bias": bf16(drawn["layers"][2]["moe"]["down_bias"])}},
            None,
        ],
        "final_norm": bf16(drawn["final_norm"]),
        "head": bf16(drawn["head"]),
    }


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return write_random(tmp_path_factory.mktemp("models") / "parent", CONFIG, extra_files=FILES)


@pytest.fixture(scope="module")
def cut(parent) -> Path:
    return export(parent, parent.parent / "cut", view())


@pytest.fixture
def child(cut, tmp_path) -> Path:
    """A copy of `cut` to damage."""
    return Path(shutil.copytree(cut, tmp_path / "child"))


def edit(directory: Path, file: str, **changes: Any) -> None:
    data = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**data, **changes}))


def test_a_child_that_was_only_cut(parent, cut):
    opened = open_child(parent, cut, every_expert=True)
    assert opened.child == view()
    assert opened.child.rope is None and opened.differing == ()
    assert opened.provenance["seed"] == 7
    assert not delta_leaves(CONFIG, load_delta(parent, cut, ()))


def test_rotary_settings_of_its_own(parent, tmp_path):
    rope = replace(CONFIG.rope, factor=8.0)
    opened = open_child(parent, export(parent, tmp_path / "long", view(rope=rope)))
    assert opened.child == view(rope=rope) and opened.child.config.rope.factor == 8.0


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_was_trained_comes_back_and_exports_to_the_same_bytes(tmp_path, form, padded):
    parent = write_random(tmp_path / "parent", CONFIG, form, extra_files=FILES)
    trained = delta_leaves(CONFIG, trained_delta())
    child = view(PLAIN_WINDOWS if padded else WINDOWS, dense_delta=trained_delta())
    out = export(parent, tmp_path / "child", child, pad_experts=padded)
    opened = open_child(parent, out)
    assert opened.child == replace(child, dense_delta=None)
    assert set(opened.differing) == set(map(dotted, trained))
    assert opened.differing[0] == "layers.0.attention.q_weight" and opened.differing[-1] == "head"
    delta = load_delta(parent, out, opened.differing)
    found = delta_leaves(CONFIG, delta)  # checks every shape against the parent's
    assert list(found) == list(trained)
    for path, leaf in found.items():
        assert leaf.dtype == np.float32, path
        expected, moe = trained[path], path[2:3] == ("moe",)
        if not moe:
            np.testing.assert_array_equal(leaf, expected)
            continue
        ids = list(KEPT[of_type(int, path[1])])
        axis = 1 if path[-1] == "router_weight" else 0
        np.testing.assert_array_equal(leaf.take(ids, axis), expected.take(ids, axis), err_msg=dotted(path))
        others = [expert for expert in range(7) if expert not in ids]
        assert (leaf.take(others, axis) != expected.take(others, axis)).any() or not others
    again = export(parent, tmp_path / "again", replace(child, dense_delta=delta), pad_experts=padded)
    assert stored_bytes(again) == stored_bytes(out)


def test_experts_that_are_gone_have_the_parents_values(parent, tmp_path):
    child = view(dense_delta={"layers": [None, None, {"moe": trained_delta()["layers"][2]["moe"]}, None]})
    out = export(parent, tmp_path / "child", child)
    moe = load_delta(parent, out, ("layers.2.moe.down", "layers.2.moe.down_bias"))["layers"][2]["moe"]
    tensors, stem = open_tensors(parent).tensors, "model.layers.2.mlp.experts.down_proj"
    down = mxfp4.decode(tensors[f"{stem}_blocks"].read(), tensors[f"{stem}_scales"].read())
    gone = [0, 2, 3, 5, 6]
    np.testing.assert_array_equal(moe["down"][gone], down[gone])
    assert (moe["down"][[1, 4]] != down[[1, 4]]).any()
    np.testing.assert_array_equal(moe["down_bias"][gone], tensors[f"{stem}_bias"].read().astype(np.float32)[gone])
    assert moe["gate_up"] is None and moe["norm"] is None


def test_a_parent_that_is_stored_wider_is_compared_as_it_is_exported(tmp_path):
    parent = write_random(tmp_path / "parent", CONFIG)
    rng = np.random.default_rng(1)
    rewrite(
        parent,
        **{
            "model.norm.weight": rng.standard_normal(96).astype(np.float32),
            "model.layers.2.mlp.router.weight": rng.standard_normal((7, 96)).astype(np.float32),
        },
    )
    opened = open_child(parent, export(parent, tmp_path / "child", view()), every_expert=True)
    assert opened.differing == ()


def test_another_parent_is_refused(cut, tmp_path):
    other = write_random(tmp_path / "other", CONFIG, seed=1, extra_files=FILES)
    with pytest.raises(
        PuzzleError, match=r"cut was not cut from .*other: model\.layers\.0\.mlp\.router\.weight differs"
    ):
        open_child(other, cut)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"swiglu_limit": 2.5}, r"swiglu_limit is 1\.5, but 2\.5 in the parent"),
        ({"head_dim": 12}, "head_dim is 10, but 12 in the parent"),
        ({"blocks": CONFIG.blocks[:2]}, "it has 4 layers, but the parent 2"),
    ],
)
def test_a_parent_of_another_shape_is_refused(cut, tmp_path, changes, message):
    config: ModelConfig = replace(CONFIG, **changes)
    other = write_random(tmp_path / "other", config, extra_files=FILES)
    with pytest.raises(PuzzleError, match=message):
        open_child(other, cut)


def test_another_form_is_refused(cut, tmp_path):
    other = write_random(tmp_path / "other", CONFIG, "bf16", extra_files=FILES)
    with pytest.raises(PuzzleError, match="experts are stored as mxfp4, the parent's as bf16"):
        open_child(other, cut)


@pytest.mark.parametrize("content", [b"{}", None])
def test_another_tokenizer_is_refused(parent, child, content):
    if content is None:
        (child / "tokenizer.json").unlink()
    else:
        (child / "tokenizer.json").write_bytes(content)
    with pytest.raises(PuzzleError, match=r"tokenizer\.json is not the parent's"):
        open_child(parent, child)


def test_a_child_without_a_record_is_refused(parent, child):
    (child / "provenance.json").unlink()
    with pytest.raises(PuzzleError, match=r"has no provenance\.json"):
        open_child(parent, child)
    with pytest.raises(PuzzleError, match=r"parent has no provenance\.json"):
        open_child(parent, parent)
    (child / "provenance.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a JSON list, but must hold an object"):
        open_child(parent, child)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"kept_experts": None}, "kept_experts is null, but must be a list"),
        ({"kept_experts": [[0, "1"]] * 4}, r"kept_experts\[0\]\[1\] is a text, but must be a whole number"),
        ({"windows": [5, 9.5, 5, None]}, r"windows\[1\] is a number, but must be a whole number or null"),
        ({"trained": "all"}, "trained is a text, but must be a list"),
        ({"kept_experts": KEPT[:3]}, "of 3 and 4 layers, config.json of 4"),
        ({"windows": [5, 9, 7, None]}, r"windows\[2\] is 7, but config\.json has 5"),
        ({"kept_experts": (*KEPT[:3], (0, 5))}, r"keeps 2 experts in layer 3, but config\.json has 3"),
        ({"kept_experts": (*KEPT[:3], (0, 6, 5))}, r"does not fit .*\(0, 6, 5\) are not ascending"),
        ({"kept_experts": (*KEPT[:3], (0, 5, 7))}, "does not fit .*layer 3 keeps experts"),
        (
            {"kept_experts": (*KEPT[:3], (0, 4, 6))},
            r"model\.layers\.3\.mlp\.router\.weight differs in row 1, expert 4 of the parent",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(parent, child, changes, message):
    edit(child, "provenance.json", **changes)
    with pytest.raises(PuzzleError, match=message):
        open_child(parent, child)


def changed(directory: Path, name: str, row: int) -> None:
    """Flips one bit of a tensor's row."""
    values = open_tensors(directory).tensors[name].read()
    values[row].reshape(-1).view(np.uint8)[0] ^= 1
    rewrite(directory, **{name: values})


def test_changed_experts_that_no_record_calls_trained_are_refused(parent, child):
    name = "model.layers.3.mlp.experts.gate_up_proj_blocks"
    changed(child, name, 1)  # the sampled row of layer 3 is 3 % 3 = 0
    assert open_child(parent, child).differing == ()
    with pytest.raises(PuzzleError, match=f"{name} differs in row 1, expert 5 of the parent"):
        open_child(parent, child, every_expert=True)
    changed(child, name, 0)
    with pytest.raises(PuzzleError, match=f"{name} differs in row 0, expert 0 of the parent"):
        open_child(parent, child)
    edit(child, "provenance.json", trained=["layers.3.moe.gate_up"])
    assert open_child(parent, child).differing == ("layers.3.moe.gate_up",)
    changed(child, "model.layers.1.mlp.experts.down_proj_bias", 6)
    with pytest.raises(PuzzleError, match="down_proj_bias differs in row 6, expert 6"):
        open_child(parent, child)


def test_padding_that_could_be_chosen_is_refused(parent, tmp_path):
    out = export(parent, tmp_path / "padded", view(PLAIN_WINDOWS), pad_experts=True)
    assert open_child(parent, out).child == view(PLAIN_WINDOWS)
    bias = open_tensors(out).tensors["model.layers.2.mlp.router.bias"].read()
    bias[4] = 0
    rewrite(out, **{"model.layers.2.mlp.router.bias": bias})
    with pytest.raises(PuzzleError, match=r"keeps 2 experts in layer 2, but config\.json has 7"):
        open_child(parent, out)


def test_damage_and_unknown_names_are_refused(parent, child):
    with pytest.raises(ConfigError, match=r"layers\.0\.moe\.up is no parameter"):
        load_delta(parent, child, ("layers.0.moe.up",))
    rewrite(child, **{"model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        open_child(parent, child)
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_child(parent, child / "nowhere")
