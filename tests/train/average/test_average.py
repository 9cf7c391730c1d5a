"""The average of two policies: its bytes, its record, refusals, and the weight that a sweep chooses."""

import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import Origin, export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.convert_hf.table import checkpoint_tensors
from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import Chat
from puzzle_jax.train.__main__ import main
from puzzle_jax.train.average import sweep as average_sweep
from puzzle_jax.train.average import weights as averaging
from puzzle_jax.train.average.sweep import Choice, Measured, choose
from puzzle_jax.train.average.weights import Pair, blend, write_average
from tests.convert_hf.checkpoints import assert_trees_equal, rewrite, stored_bytes
from tests.convert_hf.qwen import qwen_config, write_qwen
from tests.support import model_logits, printed, random_params, random_tokens
from tests.train.distill.toy_distill import CONFIG, KEPT, cut, save_parent, stored

PRUNED = CONFIG.with_blocks((BlockConfig(5, 16), BlockConfig(4, 24)))
SHORT = {"--problems": 2, "--tasks": "add", "--efforts": "low", "--max-tokens": 4}
BF16 = ml_dtypes.bfloat16
DENSE = jax.jit(to_compute, static_argnums=1)
DOWN = "model.layers.1.mlp.experts.down_proj"


def policy(
    start: Path, out: Path, seed: int, *, stops: bool = False, experts: bool = False, scale=1.0, **record
) -> Path:
    """A model trained from `start`, as reinforcement learning exports it: all but experts and routers is trained.

    One bias has the same trained values whatever the seed. With `stops` it ends every answer at once; with `experts` a
    router and packed matrices of layer 1 are trained too.
    """
    drawn, same = random_params(PRUNED, seed), random_params(PRUNED, 99)
    layers = [
        {"attention": drawn["layers"][0]["attention"] | {"k_bias": same["layers"][0]["attention"]["k_bias"]}},
        {"attention": dict(drawn["layers"][1]["attention"]), "moe": {"norm": drawn["layers"][1]["moe"]["norm"]}},
    ]
    delta: Params = {name: np.array(drawn[name]) for name in ("embedding", "final_norm", "head")} | {"layers": layers}
    delta["embedding"][0, :5] = -0.0
    if stops:  # one feature outweighs all others and favours the end token
        layers[1]["attention"]["o_bias"] = np.eye(1, PRUNED.hidden_size, dtype=np.float32)[0] * 1e3
        delta["head"][0, 1] = 10.0
    if experts:
        moe = drawn["layers"][1]["moe"]
        packed = mxfp4.decode(*mxfp4.encode(np.asarray(moe["down"])))
        layers[1]["moe"] |= {"down": packed, "down_bias": moe["down_bias"], "router_weight": moe["router_weight"]}
    everyone = [list(range(block.num_experts)) for block in PRUNED.blocks]
    export_child(
        start,
        out,
        PRUNED,
        everyone,
        provenance={"parent": "the parent", "methods": ["greedy"], **record},
        dense_delta=delta,
        kv_scales=KVScales(jnp.array([scale, 2.0]), jnp.array([3.0, 4.0 / scale])),
        origin=Origin(CONFIG, KEPT, ["layers.0.moe.norm"]),
    )
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """parent/, start/ cut from it, and policies a/, b/ and experts/ trained from that."""
    root = tmp_path_factory.mktemp("average")
    save_parent(root / "parent")
    cut(root / "parent", root / "start")
    policy(root / "start", root / "a", 1, grpo=[{"step": 3}])
    policy(root / "start", root / "b", 2, stops=True, scale=2.0, grpo=[{"step": 5}])
    policy(root / "start", root / "experts", 3, experts=True)
    return root


def averaged(root: Path, out: Path, weight: float, b: str = "b") -> Path:
    write_average(Pair.open(root / "a", root / b), weight, out)
    return out


def record(directory: Path) -> dict:
    return json.loads((directory / "provenance.json").read_text())


def command(a: Path, b: Path, out: Path, **settings) -> list[str]:
    """Arguments of the command line; None leaves an option out."""
    given = ["average", str(a), str(b), "--out", str(out)]
    for name, value in settings.items():
        if value is not None:
            given += [f"--{name}", ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)]
    return given


# Bytes ----------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_numpy_and_what_is_equal_keeps_its_bytes(root, tmp_path):
    a, b, out = stored(root / "a"), stored(root / "b"), stored(averaged(root, tmp_path / "out", 0.3))
    equal = {name for name in a if a[name].tobytes() == b[name].tobytes()}
    frozen = {spec.name for spec in checkpoint_tensors(PRUNED, "mxfp4") if spec.by_expert}
    norm, shared = "model.layers.0.post_attention_layernorm.weight", "model.layers.0.self_attn.k_proj.bias"
    assert equal == frozen | {norm, shared}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.sinks"} <= a.keys() - equal
    for name, values in out.items():
        if name in equal:
            assert values.tobytes() == a[name].tobytes()
            continue
        x, y = a[name].astype(np.float32), b[name].astype(np.float32)
        np.testing.assert_array_equal(values, (np.float32(0.7) * x + np.float32(0.3) * y).astype(BF16), err_msg=name)
        exact = 0.7 * x.astype(np.float64) + 0.3 * y.astype(np.float64)
        np.testing.assert_allclose(values.astype(np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("weight,name,b", [(0.0, "a", "b"), (1.0, "b", "b"), (1.0, "experts", "experts")])
def test_the_ends_are_one_model_to_the_byte(root, tmp_path, weight, name, b):
    out = averaged(root, tmp_path / "out", weight, b)
    assert stored_bytes(out) == stored_bytes(root / name)  # including the scales of the cache
    np.testing.assert_array_equal(describe_checkpoint(out).kv_scales, describe_checkpoint(root / name).kv_scales)
    assert record(out)["averaged"]["weight"] == weight


def test_ends_keep_the_sign_of_zero_and_equal_values_stay():
    a, b = np.array([-0.0, 1.5, 3.0], BF16), np.array([0.0, -2.0, 3.0], BF16)
    assert np.signbit(blend(a, b, 0.0)).tolist() == [True, False, False]
    np.testing.assert_array_equal(blend(a, b, 1.0), [0.0, -2.0, 3.0])
    np.testing.assert_array_equal(blend(a, b, 0.25), [0.0, 0.625, 3.0])
    grid = np.random.default_rng(0).standard_normal(1000).astype(BF16)
    for weight in (0.1, 0.3, 0.7, 0.9):
        np.testing.assert_array_equal(blend(grid, grid, weight).astype(BF16), grid)


def test_the_average_loads_and_is_the_one_that_a_sweep_asks(root, tmp_path):
    ours, theirs = (load_checkpoint(root / name).params for name in "ab")
    written = {}
    for name in ("b", "experts"):
        pair = Pair.open(root / "a", root / name)
        write_average(pair, 0.3, tmp_path / name)
        written[name] = load_checkpoint(tmp_path / name)
        assert_trees_equal(pair.params(ours, 0.3), written[name].params)
    assert written["b"].config == PRUNED

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        if x.dtype == jnp.uint8:
            return x
        return jnp.asarray((np.asarray(x) * np.float32(0.7) + np.asarray(y) * np.float32(0.3)).astype(BF16))

    tokens = random_tokens(PRUNED, 2, 7)
    found, wanted = (
        model_logits(DENSE(params, jnp.dtype("float32")), PRUNED, tokens)
        for params in (written["b"].params, jax.tree.map(mean, ours, theirs))
    )
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_trained_experts_are_averaged_and_packed_again(root, tmp_path):
    out = stored(averaged(root, tmp_path / "out", 0.5, "experts"))
    a, b = stored(root / "a"), stored(root / "experts")
    values = [mxfp4.decode(found[f"{DOWN}_blocks"], found[f"{DOWN}_scales"]) for found in (a, b, out)]
    assert (values[0] != values[1]).any()
    packed = mxfp4.encode(np.float32(0.5) * values[0] + np.float32(0.5) * values[1])
    np.testing.assert_array_equal(values[2], mxfp4.decode(*packed))
    for name in (f"{DOWN}_bias", "model.layers.1.mlp.router.weight"):
        mean = (a[name].astype(np.float32) + b[name].astype(np.float32)) / 2
        np.testing.assert_array_equal(out[name], mean.astype(BF16))
    for name in ("model.layers.1.mlp.experts.gate_up_proj_blocks", f"{DOWN.replace('1', '0')}_scales"):
        assert out[name].tobytes() == a[name].tobytes() == b[name].tobytes()
    trained = record(tmp_path / "out")["trained"]
    assert {"layers.1.moe.down", "layers.1.moe.router_weight", "layers.0.moe.norm"} <= set(trained)


def test_experts_that_are_stored_in_bf16_are_averaged_there(tmp_path):
    save_checkpoint(tmp_path / "parent", CONFIG, random_params(CONFIG), config_base={}, form="bf16")
    cut(tmp_path / "parent", tmp_path / "start")
    policy(tmp_path / "start", tmp_path / "a", 1)
    policy(tmp_path / "start", tmp_path / "experts", 3, experts=True)
    averaged(tmp_path, tmp_path / "out", 0.3, "experts")
    a, b, out = (stored(tmp_path / name) for name in ("a", "experts", "out"))
    mean = np.float32(0.7) * a[DOWN].astype(np.float32) + np.float32(0.3) * b[DOWN].astype(np.float32)
    np.testing.assert_array_equal(out[DOWN], mean.astype(BF16))
    gate_up = DOWN.replace("down", "gate_up")
    assert out[gate_up].tobytes() == a[gate_up].tobytes()


# Record ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["experts", "fp8"])
def test_matrices_that_files_hold_one_by_one_are_averaged(tmp_path, storage):
    """A and B are trained in different places; in FP8, keys and values become bf16 where queries were trained."""
    config = qwen_config((BlockConfig(3), BlockConfig(3)))
    parent = write_qwen(tmp_path / "parent", config, storage)
    everyone = [range(3)] * 2
    for seed, (name, part, weight) in enumerate((("a", "attention", "q_weight"), ("b", "moe", "down"))):
        layers = [{part: {weight: random_params(config, seed + 1)["layers"][0][part][weight]}}, None]
        export_child(parent, tmp_path / name, config, everyone, provenance={}, dense_delta={"layers": layers})
    pair = Pair.open(tmp_path / "a", tmp_path / "b")
    assert set(pair.differing) == {("layers", 0, "attention", "q_weight"), ("layers", 0, "moe", "down")}
    write_average(pair, 0.25, tmp_path / "out")
    a, b, out = (load_checkpoint(tmp_path / name, dtype=jnp.float32).params for name in ("a", "b", "out"))
    for part, weight in (("attention", "q_weight"), ("moe", "down")):
        x, y, found = (np.asarray(params["layers"][0][part][weight]) for params in (a, b, out))
        np.testing.assert_array_equal(found, (np.float32(0.75) * x + np.float32(0.25) * y).astype(BF16))
        x, y, found = (np.asarray(params["layers"][1][part][weight]) for params in (a, b, out))
        assert (found == x).all() and (found == y).all()


def test_the_record_tells_of_both(root, tmp_path):
    out = averaged(root, tmp_path / "out", 0.3)
    found, of_a = record(out), record(root / "a")
    kept = ("parent", "methods", "kept_experts", "windows", "trained")
    assert {name: found[name] for name in kept} == {name: of_a[name] for name in kept}
    assert found["kept_experts"] == [list(ids) for ids in KEPT] and found["windows"] == [16, 24]
    assert found["averaged"] == {
        "of": [str(root / "a"), str(root / "b")],
        "weight": 0.3,
        "grpo": [[{"step": 3}], [{"step": 5}]],
    }
    assert "grpo" not in found  # it would say that the average itself was trained
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "modeling_gpt_oss_puzzle.py"):
        assert (out / name).read_bytes() == (root / "a" / name).read_bytes()
    # The larger scales of the two: in a, k is [1, 2] and v is [3, 4]; in b, they are [2, 2] and [3, 2].
    np.testing.assert_array_equal(describe_checkpoint(out).kv_scales, [[2, 2], [3, 4]])
    assert found["kv_scales"] == {"k": [2, 2], "v": [3, 4]}


def test_an_earlier_average_is_replaced_and_can_be_averaged_itself(root, tmp_path):
    out = averaged(root, tmp_path / "out", 0.3)
    averaged(root, out, 0.6)
    assert record(out)["averaged"]["weight"] == 0.6
    write_average(Pair.open(root / "a", out), 0.5, tmp_path / "again")
    of_a, of_b = record(tmp_path / "again")["averaged"]["averaged"]
    assert of_a is None and of_b["weight"] == 0.6


def test_scales_that_only_the_record_holds_are_averaged_too(root, tmp_path):
    """A plain `gpt_oss` child carries no scales; only its record has them."""
    for name in "ab":
        shutil.copytree(root / name, tmp_path / name)
        scales = {f"model.layers.{layer}.self_attn.{kind}_scale": None for layer in range(2) for kind in "kv"}
        rewrite(tmp_path / name, **scales)
    pair = Pair.open(tmp_path / "a", tmp_path / "b")
    assert pair.ours.kv_scales is None
    np.testing.assert_array_equal(pair.kv_scales(0.5), [[2, 2], [3, 4]])
    np.testing.assert_array_equal(pair.kv_scales(1.0), [[2, 2], [3, 2]])
    change_json(tmp_path / "b" / "provenance.json", kv_scales={"k": [1, 0], "v": [1, 1]})
    with pytest.raises(PuzzleError, match="kv_scales must hold one number per layer"):
        Pair.open(tmp_path / "a", tmp_path / "b").kv_scales(0.5)


# Refusals -------------------------------------------------------------------------------------------------------------


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(capsys, given: list[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average_sweep, "load_checkpoint", None)
        patch.setattr(averaging, "export_child", None)
        assert main(given) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("puzzle train average: "), said
    return said


@pytest.mark.parametrize(
    "settings,message",
    [
        ({}, "one of weight and weights must be given, but neither is"),
        ({"weight": 0.5, "weights": [0, 1]}, "one of weight and weights must be given, but both are"),
        ({"weight": 1.5}, "weight is 1.5, but must be from 0 to 1"),
        ({"weight": -0.1}, "weight is -0.1, but must be from 0 to 1"),
        ({"weight": "nan"}, "weight is nan, but must be from 0 to 1"),
        ({"weight": 0.5, "problems": 3}, "problems is given with weight, but only weights asks problems"),
        ({"weight": 0.5, "max-tokens": 3}, "max_tokens is given with weight"),
        ({"weight": 0.5, "reference": "parent"}, "reference is given with weight"),
        ({"weights": [0, 1]}, "weights is given without problems"),
        ({"weights": [0, 2], "problems": 1}, "weights is 2.0, but must be from 0 to 1"),
        ({"weights": [0, 0.5, 0.0], "problems": 1}, "weights is 0,0.5,0, but must name each once"),
        ({"weights": [0], "problems": 0}, "per_task 0 ask no question"),
        (
            {"weights": [0], "problems": 1, "tasks": ["add", "add"]},
            "tasks is 'add,add', but must name",
        ),
        ({"weights": [0], "problems": 1, "tasks": "poetry"}, "task is 'poetry'"),
        ({"weights": [0], "problems": 1, "efforts": "extreme"}, "extreme"),
        ({"weights": [0], "problems": 1, "seed": 100}, "seed is 100"),
        ({"weights": [0], "problems": 1, "batch-size": 0}, "batch_size is 0"),
        ({"weights": [0], "problems": 1, "temperature": -1}, "temperature is -1.0"),
        ({"weights": [0], "problems": 1, "max-tokens": '{"low": 0}'}, "max_tokens.low is 0, but must be at least 1"),
        ({"weights": [0], "problems": 1, "max-tokens": 1000}, "but the context of A and B is 768"),
        ({"weights": [0], "problems": 1, "reference": "nowhere"}, "model 'reference': nowhere is not a directory"),
    ],
)
def test_bad_options_are_one_sentence_before_weights_are_read(root, tmp_path, capsys, settings, message):
    said = refusal(capsys, command(root / "a", root / "b", tmp_path / "out", **settings))
    assert message in said and not (tmp_path / "out").exists()


def test_models_of_another_kind_are_refused(root, tmp_path, capsys):
    def changed(name: str) -> Path:
        return Path(shutil.copytree(root / "b", tmp_path / name))

    (changed("tokenizer") / "tokenizer.json").write_text("{}")
    (changed("template") / "chat_template.jinja").write_text("reasoning_effort")
    (changed("unrecorded") / "provenance.json").unlink()
    change_json(changed("ends") / "generation_config.json", eos_token_id=[9])
    change_json(changed("rope") / "config.json", max_position_embeddings=700)
    change_json(changed("kept") / "provenance.json", kept_experts=[[0, 1, 3, 5, 7], [1, 2, 4, 6]])
    change_json(changed("names") / "provenance.json", trained=[3])
    change_json(changed("untold") / "provenance.json", trained=["layers.1.moe.norm"])
    change_json(tmp_path / "untold" / "provenance.json", trained=[])
    bias = "model.layers.0.mlp.router.bias"
    rewrite(changed("router"), **{bias: stored(root / "b")[bias] + BF16(1)})
    for blocks, name in (((BlockConfig(5, 16), BlockConfig(4, None)), "window"), ((BlockConfig(5, 16),) * 2, "shape")):
        ids = [list(range(block.num_experts)) for block in blocks]
        export_child(root / "parent", tmp_path / name, CONFIG.with_blocks(blocks), ids, provenance={})
    for name, message in (
        ("nowhere", "nowhere is not a directory"),
        ("tokenizer", "tokenizer.json is not the same as"),
        ("template", "chat_template.jinja is not the same as"),
        ("unrecorded", "has no provenance.json, so nobody knows what of it was trained"),
        ("ends", "generation_config.json: eos_token_id is [9], but"),
        ("rope", "config.json: max_position is 700, but 768 in"),
        ("kept", "provenance.json: kept_experts is [[0, 1, 3, 5, 7], [1, 2, 4, 6]], but [[0, 2, 3, 5, 7]"),
        ("names", "does not list kept_experts and the names of trained parameters"),
        ("router", f"differ in {bias}, which neither's provenance.json calls trained"),
        ("window", "config.json: layer 1 is BlockConfig(num_experts=4, window=None), but BlockConfig("),
        ("shape", "config.json: layer 1 is BlockConfig(num_experts=5, window=16), but BlockConfig(num_experts=4"),
    ):
        said = refusal(capsys, command(root / "a", tmp_path / name, tmp_path / "out", weight=0.5))
        assert message in said and str(tmp_path / name) in said
        assert not (tmp_path / "out").exists()


def test_models_of_another_start_are_refused(root, tmp_path, capsys):
    save_parent(tmp_path / "parent", seed=5)
    cut(tmp_path / "parent", tmp_path / "start")
    policy(tmp_path / "start", tmp_path / "b", 2)
    said = refusal(capsys, command(root / "a", tmp_path / "b", tmp_path / "out", weight=0.5))
    assert "so they do not come from one start" in said


def test_directories_that_hold_something_else_are_refused_and_kept(root, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    shutil.copytree(root / "start", tmp_path / "child")
    reference = {"weights": [0, 1], "problems": 1, "reference": root / "parent"}
    for out, settings, message in (
        (tmp_path / "foreign", {"weight": 0.5}, "foreign, which exists and holds no average"),
        (tmp_path / "file", {"weight": 0.5}, "file, which exists and holds no average"),
        (tmp_path / "child", {"weight": 0.5}, "child, which exists and holds no average"),
        (root / "a", {"weight": 0.5}, "which is A; name another directory"),
        (root / "a" / ".." / "b", {"weight": 1}, "which is B; name another directory"),
        (root / "parent", reference, "which is reference; name another directory"),
    ):
        assert message in refusal(capsys, command(root / "a", root / "b", out, **settings))
    assert "A and B are both" in refusal(capsys, command(root / "a", root / "a", tmp_path / "out", weight=0.5))
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


def test_values_that_are_no_numbers_are_refused(root, tmp_path):
    shutil.copytree(root / "b", tmp_path / "b")
    rewrite(tmp_path / "b", **{"model.norm.weight": np.full(PRUNED.hidden_size, np.nan, BF16)})
    with pytest.raises(PuzzleError, match="final_norm are not all finite"):
        write_average(Pair.open(root / "a", tmp_path / "b"), 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The choice -----------------------------------------------------------------------------------------------------------


def measured(right: float, tokens: int, problems: int = 100, first: int = 0) -> Measured:
    """The same answers at two efforts: the share `right` of the problems, starting at number `first`, is correct."""
    return measured_as(np.roll(np.arange(problems) < right * problems, first), tokens)


def measured_as(correct: np.ndarray, tokens: int) -> Measured:
    """Answers at two efforts of `tokens` tokens each, correct for the problems where `correct` is true."""
    efforts = ("low", "high")
    answers = [
        Trace("add", effort, seed, {}, (1,), (2,) * tokens, float(right), False)
        for effort in efforts
        for seed, right in enumerate(correct)
    ]
    return Measured.of(answers, efforts)


@pytest.mark.parametrize(
    "points,limit,weight,why",
    [
        # One problem in 100 is lost; the standard error is sqrt(0.01 * 0.99 / 100) = 0.00995, so 0.01 is not within it.
        ({0.0: (0.8, 90), 0.5: (0.79, 60)}, None, 0.0, "the highest accuracy"),
        # 12 are lost and 11 won: a difference of 0.01, within its standard error of 0.048.
        ({0.0: (0.5, 90), 0.5: (0.49, 60, 12)}, None, 0.5, "within one standard error of the accuracy of weight 0"),
        ({0.0: (0.9, 90), 0.5: (0.6, 60), 1.0: (0.3, 30)}, None, 0.0, "the highest accuracy"),
        ({0.0: (0.9, 90), 0.5: (0.6, 60), 1.0: (0.3, 30)}, 89.0, 0.5, "the highest accuracy with at most 89.0 tokens"),
        ({0.0: (0.9, 90), 0.5: (0.6, 60), 1.0: (0.3, 30)}, 60.0, 0.5, "the highest accuracy with at most 60.0 tokens"),
        ({0.0: (0.9, 90), 0.5: (0.6, 60), 1.0: (0.3, 30)}, 20.0, 1.0, "the fewest tokens, since no weight has at most"),
        # With equal accuracies on the same problems, the shortest is chosen; with equal lengths too, the first.
        ({0.0: (0.6, 60), 0.5: (0.6, 50), 1.0: (0.6, 70)}, 65.0, 0.5, "the highest accuracy with at most 65.0 tokens"),
        ({0.0: (0.6, 60), 0.5: (0.6, 60)}, None, 0.0, "the highest accuracy"),
        ({0.0: (0.6, 70), 0.5: (0.7, 70)}, 60.0, 0.5, "the fewest tokens, since no weight"),
    ],
)
def test_the_best_point_of_the_frontier(points, limit, weight, why):
    found = choose({w: measured(*point[:2], first=(*point, 0)[2]) for w, point in points.items()}, ["add"] * 100, limit)
    assert found.weight == weight and why in found.why


def test_standard_errors_are_those_of_problems_within_their_task():
    """Draws resample problems within their task, so a task whose problems are all lost or all won adds no variance."""
    best, other = measured(1.0, 90, 10), measured(0.9, 60, 10, first=1)
    assert choose({0.0: best, 1.0: other}, ["add"] * 10, None).weight == 0.0  # 0.1 lost, standard error 0.095
    number = np.arange(10)
    best, other = measured_as((number < 3) | (number > 4), 90), measured_as(number > 2, 60)  # 3 lost and 2 won of 10
    assert choose({0.0: best, 1.0: other}, ["add"] * 10, None) == Choice(
        1.0, "the fewest tokens within one standard error of the accuracy of weight 0"
    )
    tasks = ["add"] * 3 + ["chain"] * 2 + ["recall"] * 5
    assert choose({0.0: best, 1.0: other}, tasks, None).weight == 0.0


# The sweep ------------------------------------------------------------------------------------------------------------


def swept(*given: str) -> None:
    assert main(list(given)) == 0


def test_a_sweep_asks_every_weight_and_writes_one(root, tmp_path, capsys):
    out, settings = tmp_path / "out", {name.removeprefix("--"): value for name, value in SHORT.items()}
    swept(*command(root / "a", root / "b", out, weights=[1, 0.5, 0], reference=root / "start", **settings))
    found = record(out)["averaged"]
    sweep = found["sweep"]
    assert [point["weight"] for point in sweep["points"]] == [0, 0.5, 1]
    assert [point["tokens"] for point in sweep["points"]][1:] == [1, 1]  # b ends at once, and so does half of it
    questions = QuestionSet(("add",), ("low",), 2, "confirmation")
    for name, point in (("a", sweep["points"][0]), ("start", sweep["reference"])):
        params, chat = DENSE(load_checkpoint(root / name).params, jnp.dtype("float32")), Chat.load(root / name)
        answers = answer_questions(params, PRUNED, chat, questions, max_tokens={"low": 4})
        assert point["tokens"] == np.mean([len(answer.completion) for answer in answers]) > 1
    assert sweep["reference"]["model"] == str(root / "start")
    assert (sweep["split"], sweep["problems"], sweep["max_tokens"]) == ("confirmation", 2, {"low": 4})
    assert found["weight"] == sweep["chosen"] == 0.5  # no answer is correct, so the first of the shortest is taken
    write_average(Pair.open(root / "a", root / "b"), 0.5, tmp_path / "alone")
    alone, wanted = stored_bytes(tmp_path / "alone"), stored_bytes(out)
    scales = {name for name in wanted if name.endswith("_scale")}
    assert {name: wanted[name] for name in wanted if name not in scales} == {
        name: alone[name] for name in alone if name not in scales
    }
    # The scales are those of the average's own answers, not the larger ones of a and b.
    params, chat = DENSE(load_checkpoint(out).params, jnp.dtype("float32")), Chat.load(out)
    answers = answer_questions(params, PRUNED, chat, questions, max_tokens={"low": 4})
    own = np.asarray(calibrate_cache(params, PRUNED, micro_batches(answers)), np.float32)
    assert np.array_equal(np.asarray([record(out)["kv_scales"][kind] for kind in "kv"], np.float32), own)
    assert "average with weight 0.5" in capsys.readouterr().err


def test_a_sweep_without_a_reference_has_no_limit(root, tmp_path, monkeypatch):
    """With scripted answers: the measured numbers, their table, and the weight chosen from them."""
    asked = []

    def answer(params, config, chat, questions, *, max_tokens, temperature, slots, on_answer) -> list[Trace]:
        weight = [0.0, 0.75][len(asked)]
        asked.append((questions, dict(max_tokens), temperature, slots))
        right, tokens = {0.0: (6, 9), 0.75: (2, 3)}[weight]
        answers = []
        for index, (problem, effort) in enumerate(questions.questions()):
            length = tokens * (2 if effort == "high" else 1)
            reward = float(index // 2 < right)
            answers.append(Trace(problem.task, effort, problem.seed, {}, (1,), (2,) * length, reward, False))
            on_answer(index, answers[-1])
        return answers

    monkeypatch.setattr(average_sweep, "answer_questions", answer)
    pair = Pair.open(root / "a", root / "b")
    questions = QuestionSet(("add", "chain"), ("low", "high"), 4, "confirmation", 7)
    sweep = average_sweep.Sweep.open(pair, [0.75, 0.0], questions, {"low": 20, "high": 30}, 5, None, 0.5)
    found = average_sweep.run_sweep(pair, sweep, Console(file=io.StringIO()))
    assert asked == [(questions, {"low": 20, "high": 30}, 0.5, 5)] * 2
    assert found.choice == Choice(0.0, "the highest accuracy")
    assert found.record()["points"] == [
        {
            "weight": 0.0,
            "accuracy": 0.75,
            "tokens": 13.5,
            "efforts": {"low": {"accuracy": 0.75, "tokens": 9.0}, "high": {"accuracy": 0.75, "tokens": 18.0}},
        },
        {
            "weight": 0.75,
            "accuracy": 0.25,
            "tokens": 4.5,
            "efforts": {"low": {"accuracy": 0.25, "tokens": 3.0}, "high": {"accuracy": 0.25, "tokens": 6.0}},
        },
    ]
    assert "reference" not in found.record() and found.record()["seed"] == 7

    def shown(swept) -> list[list[str]]:
        console = Console(width=80, file=io.StringIO())
        console.print(swept.table())
        lines = printed(console).splitlines()
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]

    assert shown(found) == [
        ["0", "75.0% / 9.0", "75.0% / 18.0", "75.0% / 13.5"],
        ["0.75", "25.0% / 3.0", "25.0% / 6.0", "25.0% / 4.5"],
    ]
    wrong = measured_as(np.zeros(8, bool), 9)
    referred = average_sweep.Swept(sweep, found.points, found.points[0.0], found.choice, found.scales)
    assert shown(referred)[1:] == [
        ["0.75", "25.0% / 3.0", "25.0% / 6.0", "25.0% / 4.5", "33.3% / 33.3%"],
        ["reference", "75.0% / 9.0", "75.0% / 18.0", "75.0% / 13.5", "100.0% / 100.0%"],
    ]
    assert shown(average_sweep.Swept(sweep, found.points, wrong, found.choice, found.scales))[0][-1] == "- / 150.0%"
