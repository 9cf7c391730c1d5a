"""Children with trained routers and experts: what is written, what is kept, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.__main__ import main
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import checkpoint_tensors
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.convert_hf.tensors.files import open_tensors
from puzzle_jax.convert_hf.tensors.planned import NEVER
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.model.child import Child, ChildBlock, cut_params, with_delta
from puzzle_jax.train.fake_quant import round_to_mxfp4
from tests.convert_hf.checkpoints import assert_trees_equal, packable_config, rows, stored_bytes, write_random
from tests.support import present, random_params

CONFIG = packable_config()
KEPT = ((0, 2, 3, 5, 6), (0, 1, 4, 6), (1, 4), (0, 5, 6))
PLAIN_WINDOWS = (5, None, 5, None)
TRAINED = ("down", "down_bias", "gate_up", "gate_up_bias", "router_bias", "router_weight")


@pytest.fixture(scope="module", params=["mxfp4", "bf16"])
def parent(request, tmp_path_factory) -> Path:
    return write_random(tmp_path_factory.mktemp(request.param) / "parent", CONFIG, request.param)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_random(tmp_path_factory.mktemp("packed") / "parent", CONFIG)


def child_of(delta: dict | None = None) -> Child:
    return Child(CONFIG, tuple(map(ChildBlock, KEPT, PLAIN_WINDOWS)), dense_delta=delta)


def export(parent: Path, out: Path, delta: Any, **options) -> Path:
    child = child_of()
    export_child(parent, out, child.config, KEPT, provenance={}, dense_delta=delta, **options)
    return out


def on_grid(weight: Any) -> np.ndarray:
    return mxfp4.decode(*mxfp4.encode(np.asarray(weight)))


def trained_layers() -> list[Any]:
    """Layer 1 has the whole mixture except its norm, with experts on the MXFP4 grid; layer 2 has one matrix."""
    drawn = random_params(CONFIG, seed=9)["layers"]
    whole = {name: np.asarray(drawn[1]["moe"][name]) for name in TRAINED}
    whole |= {name: on_grid(whole[name]) for name in ("gate_up", "down")}
    return [None, {"attention": None, "moe": whole}, {"moe": {"down": on_grid(drawn[2]["moe"]["down"])}}, None]


def expert_values(directory: Path, layer: int, name: str) -> np.ndarray:
    """A stack of matrices as a checkpoint holds it, in float32."""
    tensors, stem = open_tensors(directory).tensors, f"model.layers.{layer}.mlp.experts.{name}_proj"
    if stem in tensors:
        return tensors[stem].read().astype(np.float32)
    return mxfp4.decode(tensors[f"{stem}_blocks"].read(), tensors[f"{stem}_scales"].read())


@pytest.mark.parametrize("padded", [False, True])
def test_trained_routers_and_experts_are_cut_and_keep_their_values(parent, tmp_path, padded):
    layers = trained_layers()
    out = export(parent, tmp_path / "child", {"layers": layers}, pad_experts=padded)
    moe, ids = layers[1]["moe"], list(KEPT[1])
    for name in ("gate_up", "down"):
        np.testing.assert_array_equal(expert_values(out, 1, name)[:4], moe[name][ids])
        assert not expert_values(out, 1, name)[4:].any()
    np.testing.assert_array_equal(expert_values(out, 2, "down")[:2], layers[2]["moe"]["down"][list(KEPT[2])])
    stored = {name: tensor.read() for name, tensor in open_tensors(out).tensors.items()}
    prefix, bf16 = "model.layers.1.mlp", ml_dtypes.bfloat16
    router_bias = stored[f"{prefix}.router.bias"]
    assert len(router_bias) == (5 if padded else 4)
    np.testing.assert_array_equal(router_bias[:4], moe["router_bias"][ids].astype(bf16))
    assert (router_bias[4:] == np.asarray(NEVER, bf16)).all()
    np.testing.assert_array_equal(stored[f"{prefix}.router.weight"][:4], moe["router_weight"].T[ids].astype(bf16))
    for name in ("gate_up", "down"):
        bias = stored[f"{prefix}.experts.{name}_proj_bias"]
        np.testing.assert_array_equal(bias[:4], moe[f"{name}_bias"][ids].astype(bf16))
    record = json.loads((out / "provenance.json").read_text())
    assert record["trained"] == sorted([f"layers.1.moe.{name}" for name in TRAINED] + ["layers.2.moe.down"])
    assert "but for those that were trained" in (out / "README.md").read_text()


def test_everything_else_keeps_its_bytes(parent, tmp_path):
    out = export(parent, tmp_path / "child", {"layers": trained_layers()})
    before, after = stored_bytes(parent), stored_bytes(out)
    form = load_checkpoint(parent).form
    trained = {("layers", 1, "moe", name) for name in TRAINED} | {("layers", 2, "moe", "down")}
    changed = set()
    for spec in checkpoint_tensors(child_of().config, form):
        path = spec.path[:-1] if spec.path[-1] in ("blocks", "scales") else spec.path
        if spec.by_expert:
            cut = [rows(parent, spec.name)[expert] for expert in KEPT[present(spec.layer)]]
            same = rows(out, spec.name) == cut
        else:
            same = after[spec.name] == before[spec.name]
        if path in trained:
            changed |= set() if same else {path}
        else:
            assert same, spec.name
    assert changed == trained


def test_the_exported_child_is_the_view_cut(packed, tmp_path):
    delta = {"layers": trained_layers(), "final_norm": np.linspace(0.5, 2, 96, dtype=np.float32)}
    delta["final_norm"] = delta["final_norm"].astype(ml_dtypes.bfloat16)
    for name in ("router_weight", "router_bias", "gate_up_bias", "down_bias"):  # as exporting rounds them
        moe = delta["layers"][1]["moe"]
        moe[name] = moe[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    out = export(packed, tmp_path / "child", delta)
    whole = load_checkpoint(packed, dtype=jnp.float32, experts="dense").params
    cut = cut_params(jax.tree.map(np.asarray, whole), child_of(delta))
    exported = load_checkpoint(out, dtype=jnp.float32, experts="dense").params
    assert_trees_equal(exported, cut)


def test_experts_off_the_grid_are_rounded_to_it(packed, tmp_path):
    weight = jnp.asarray(np.random.default_rng(4).standard_normal((7, 64, 96)), jnp.bfloat16)
    out = export(packed, tmp_path / "child", {"layers": [None, None, None, {"moe": {"down": weight}}]})
    rounded = np.asarray(round_to_mxfp4(weight), np.float32)[list(KEPT[3])]
    assert (rounded != np.asarray(weight, np.float32)[list(KEPT[3])]).any()
    np.testing.assert_array_equal(expert_values(out, 3, "down"), rounded)
    again = export(
        packed, tmp_path / "again", {"layers": [None, None, None, {"moe": {"down": round_to_mxfp4(weight)}}]}
    )
    np.testing.assert_array_equal(expert_values(again, 3, "down"), rounded)


class Watched:
    """An array that records which rows are read, and fails after `until` of them."""

    def __init__(self, array: np.ndarray, until: int = 1_000) -> None:
        self.array, self.shape, self.until = array, array.shape, until
        self.asked: list[int] = []

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert rows.stop == rows.start + 1
        if len(self.asked) == self.until:
            raise OSError("the device is gone")
        self.asked.append(rows.start)
        return self.array[rows]


def test_experts_are_read_one_by_one_and_the_kept_ones_only(packed, tmp_path):
    watched = Watched(trained_layers()[1]["moe"]["gate_up"])
    export(packed, tmp_path / "child", {"layers": [None, {"moe": {"gate_up": watched}}, None, None]})
    assert watched.asked == [*KEPT[1], *KEPT[1]]  # once to check, once to pack


def test_a_killed_export_does_not_go_on_with_other_values(packed, tmp_path):
    layers = trained_layers()
    values, down = layers[1]["moe"]["gate_up"], layers[2]["moe"]["down"]

    def delta(gate_up: np.ndarray, down: Any) -> dict:
        return {"layers": [None, {"moe": {"gate_up": gate_up}}, {"moe": {"down": down}}, None]}

    options = {"shard_bytes": 30_000}
    # It fails when it is packed, after the checks.
    with pytest.raises(PuzzleError, match="child cannot be written: the device is gone"):
        export(packed, tmp_path / "child", delta(values, Watched(down, until=len(KEPT[2]))), **options)
    journal = json.loads((tmp_path / ".child.partial.json").read_text())
    assert len(journal["shards"]) > 3  # layer 1 is done
    out = export(packed, tmp_path / "child", delta(2 * values, down), **options)
    np.testing.assert_array_equal(expert_values(out, 1, "gate_up"), 2 * values[list(KEPT[1])])
    np.testing.assert_array_equal(expert_values(out, 2, "down"), down[list(KEPT[2])])


def moe_of(layer: int, **values: Any) -> dict:
    return {"layers": [{"moe": values} if index == layer else None for index in range(4)]}


@pytest.mark.parametrize(
    "delta,message",
    [
        (
            moe_of(1, router_weight=np.zeros((96, 4), np.float32)),
            r"layers\.1\.moe\.router_weight of shape \[96, 4\], but the parent has shape \[96, 7\]",
        ),
        (moe_of(0, down=np.zeros((7, 96, 64))), r"layers\.0\.moe\.down of shape \[7, 96, 64\].*\[7, 64, 96\]"),
        ({"head": np.zeros((97, 96))}, r"head of shape \[97, 96\], but the parent has shape \[96, 97\]"),
        (moe_of(2, up=np.zeros(3)), r"layers\.2\.moe\.up, which the parent does not have"),
        ({"lm_head": None}, "lm_head, which the parent does not have"),
        ({"layers": [None] * 3}, "hold 3 for layers, but the parent has 4 of them"),
        ({"layers": {}}, "hold a dict for layers, but the parent has 4"),
        ({"layers": [np.zeros(3), None, None, None]}, r"a ndarray for layers\.0, but must hold names"),
        ({"final_norm": [np.zeros(96)]}, "a list for final_norm, which is one array"),
        (moe_of(3, down_bias=np.full((7, 96), np.nan)), r"layers\.3\.moe\.down_bias are not all finite"),
        (moe_of(1, gate_up=np.full((7, 96, 128), np.inf)), r"layers\.1\.moe\.gate_up are not all finite"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_before_anything_is_written(packed, tmp_path, delta, message):
    with pytest.raises(ConfigError, match=message):
        export(packed, tmp_path / "child", delta)
    assert not list(tmp_path.iterdir())


def test_packed_experts_and_values_beyond_the_format_are_refused(packed, tmp_path):
    mixture = load_checkpoint(packed).params["layers"][0]["moe"]
    with pytest.raises(ConfigError, match=r"layers\.0\.moe\.down packed, but must hold it dense"):
        export(packed, tmp_path / "child", moe_of(0, down=mixture["down"]))
    with pytest.raises(PuzzleError, match=r"layers\.0\.mlp\.experts\.down_proj, expert 0: .*beyond"):
        export(packed, tmp_path / "child", moe_of(0, down=np.full((7, 64, 96), 2e38, np.float32)))
    assert not list(tmp_path.iterdir())


def test_children_and_merges_refuse_the_same():
    with pytest.raises(ConfigError, match=r"layers\.1\.moe\.down_bias of shape \[3, 96\]"):
        child_of(moe_of(1, down_bias=np.zeros((3, 96))))
    params = random_params(CONFIG)
    with pytest.raises(ConfigError, match="hold a list of 3, but the parent has 4 there"):
        with_delta(params, {"layers": [None] * 3})
    with pytest.raises(ConfigError, match="finalnorm, which the parent does not have"):
        with_delta(params, {"finalnorm": None})
    merged = with_delta(params, moe_of(1, router_bias=np.arange(7.0)))
    np.testing.assert_array_equal(merged["layers"][1]["moe"]["router_bias"], np.arange(7.0))
    assert merged["layers"][1]["moe"]["router_weight"] is params["layers"][1]["moe"]["router_weight"]


def test_padding_a_trained_child_keeps_the_function(tmp_path, capsys):
    blocks = (BlockConfig(7, 5), BlockConfig(7, None))
    config = packable_config(blocks)
    parent = write_random(tmp_path / "parent", config)
    child = Child(config, (ChildBlock((1, 3, 4, 6), 5), ChildBlock((0, 2, 5), None)))
    trained = random_params(config, seed=3)["layers"]
    delta = {"layers": [{"moe": {name: trained[0]["moe"][name] for name in TRAINED}}, None]}
    for name, padded in (("child", False), ("padded", True)):
        export_child(
            parent,
            tmp_path / name,
            child.config,
            child.kept,
            provenance={},
            dense_delta=delta,
            pad_experts=padded,
        )
    arguments = ["verify", str(tmp_path / "child"), str(tmp_path / "padded"), "--rows", "1", "--length", "24", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["same_function"]
