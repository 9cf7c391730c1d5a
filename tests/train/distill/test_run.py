"""Distillation from directories to a trained child: its outputs, interrupted or not, in one process or two."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from puzzle_jax.config import BlockConfig
from puzzle_jax.convert_hf.child_of import load_delta, open_child
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import read_traces, write_traces
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.settings.verbs import parse
from puzzle_jax.train.__main__ import VERBS, main
from puzzle_jax.train.distill import run as distilling
from puzzle_jax.train.distill.inputs import DistillInputs
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.distill.run import Distiller
from puzzle_jax.train.fake_quant import round_to_mxfp4
from puzzle_jax.train.loop import Trained
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import TrainState
from puzzle_jax.train.student import Student
from tests.compiler_flags import EIGHT_DEVICES, QUICK
from tests.processes.start import ended, running
from tests.support import model_logits, of_type, present
from tests.train.distill.toy_distill import (
    BLOCKS,
    CONFIG,
    KEPT,
    LENGTH,
    arguments,
    cut,
    distiller,
    make,
    metrics,
    record,
    refusal,
    save_parent,
    stored,
)
from tests.train.in_processes import in_processes
from tests.train.interrupted import stop_and_kill

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("distill"))


@pytest.fixture(scope="module")
def finished(directory, drawn_figures) -> Path:
    out = directory / "finished"
    with drawn_figures():
        assert main(["distill", *arguments(directory, out)]) == 0
    return out


@pytest.fixture(scope="module")
def origin(directory) -> Distiller:
    """The distiller of the child as it was cut."""
    return distiller(directory)


@pytest.fixture(scope="module")
def start_of(origin):
    """Maps a child's directory to the values that training it would begin with, and their metrics."""
    masters = jax.jit(origin.student.master_weights)

    def start(child: Path):
        differing = open_child(origin.recipe.parent, child).differing
        values = masters(origin.base, load_delta(origin.recipe.parent, child, differing))
        return values, origin.measure(values)

    return start


# What a run leaves


def test_the_child_is_an_ordinary_model_as_near_to_its_parent_as_the_last_evaluation_says(origin, finished, start_of):
    parent, child = (
        load_checkpoint(path, dtype=jnp.float32, experts="dense") for path in (origin.recipe.parent, finished / "child")
    )
    assert child.config.blocks == BLOCKS
    examples = origin.inputs.heldout
    tokens = np.zeros((len(examples), LENGTH), np.int32)
    counts = np.zeros(tokens.shape, bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        counts[row, example.prompt_length - 1 : len(example.tokens) - 1] = True
    p, q = (
        np.asarray(jax.nn.log_softmax(model_logits(model.params, model.config, jnp.asarray(tokens))), np.float64)
        for model in (parent, child)
    )
    kl = np.sum(np.exp(p) * (p - q), axis=-1)[counts].mean()
    targets = np.roll(tokens, -1, axis=1)
    next_token = -np.take_along_axis(q, targets[..., None], -1)[..., 0][counts].mean()
    last = metrics(finished)[-1]
    # Equal to the log up to the export's rounding to bfloat16, and to what the trainer measures on the exported values.
    assert kl == pytest.approx(last["evaluation/kl"], rel=0.01)
    assert next_token == pytest.approx(last["evaluation/next_token"], rel=0.01)
    _, found = start_of(finished / "child")
    assert found == pytest.approx({"kl": kl, "next_token": next_token}, rel=1e-5)


def test_training_brings_the_child_nearer(origin, directory, finished, start_of):
    _, before = start_of(directory / "child")
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    kls = [line["evaluation/kl"] for line in lines if "evaluation/kl" in line]
    assert len(kls) == 3 and before["kl"] > kls[0] > kls[1] > kls[2]
    assert all(line["skipped"] == 0 for line in lines)


def test_routers_and_experts_keep_the_parent_s_bytes(directory, finished):
    parent, child = stored(directory / "parent"), stored(finished / "child")
    frozen = [name for name in child if ".router." in name or ".experts." in name]
    assert len(frozen) == 16
    for name in frozen:
        kept = KEPT[int(name.split(".")[2])]
        assert child[name].tobytes() == parent[name][list(kept)].tobytes(), name
    changed = {name for name in child if name in parent and name not in frozen}
    assert all(child[name].tobytes() != parent[name].tobytes() for name in changed)


def test_provenance_keeps_what_was_there_and_tells_what_was_trained(directory, finished):
    found, (run,) = record(finished), record(finished)["distilled"]
    assert found["search"] == {"score": 0.25}
    assert found["kept_experts"] == [list(kept) for kept in KEPT] and found["windows"] == [16, 24]
    assert "layers.1.attention.sinks" in found["trained"] and not any("router" in name for name in found["trained"])
    assert run["traces"] == [str(directory / "traces.parquet")]
    assert (run["steps"], run["tokens_per_step"], run["loss"]) == (6, 2 * LENGTH, {"forward_kl": 1.0})
    last = metrics(finished)[-1]
    assert run["heldout"] == {name: last[f"evaluation/{name}"] for name in ("kl", "next_token")}
    scales = found["kv_scales"]
    assert np.shape([scales["k"], scales["v"]]) == (2, 2)
    child = load_checkpoint(finished / "child")
    np.testing.assert_array_equal(present(child.kv_scales).k, np.float32(scales["k"]))


def test_a_finished_run_writes_its_child_again_and_nothing_else(directory, finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "child")
    assert main(["distill", *arguments(directory, out)]) == 0
    same(out, finished)


def same(out: Path, other: Path) -> None:
    for name in ("child/model.safetensors", "child/provenance.json", "child/config.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics(out) == metrics(other)


# Interruption


@pytest.mark.once
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_bits(directory, finished, tmp_path, kills):
    out = tmp_path / "run"
    stop_and_kill(["distill", *arguments(directory, out)], out, 6, kills)
    assert main(["distill", *arguments(directory, out)]) == 0
    same(out, finished)


# Other ways to train


@pytest.fixture(scope="module")
def blocks(directory) -> Path:
    out = directory / "blocks"
    assert main(["distill-blocks", *arguments(directory, out)]) == 0
    return out


def test_blocks_learn_alone_and_leave_both_ends(directory, blocks, start_of):
    lines = metrics(blocks)
    assert lines[-1]["block_mse"] < 0.8 * lines[0]["block_mse"]
    assert lines[-1]["block_mse"] <= lines[-1]["worst_block_mse"]
    parent, child = stored(directory / "parent"), stored(blocks / "child")
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert child[name].tobytes() == parent[name].tobytes(), name
    assert record(blocks)["distilled"][0]["blocks"] is True
    # Distillation can begin from its child, which is nearer to the parent than the one that was cut.
    _, found = start_of(blocks / "child")
    assert found["kl"] == pytest.approx(lines[-1]["evaluation/kl"], rel=0.01)
    assert found["kl"] < start_of(directory / "child")[1]["kl"]


def test_routers_alone_leave_everything_else_as_it_was_cut(directory, start_of):
    out = directory / "routers"
    assert main(["distill", *arguments(directory, out, dense="false", train="[router]")]) == 0
    cut_child, child = stored(directory / "child"), stored(out / "child")
    assert child.keys() == cut_child.keys()
    changed = {name for name in child if child[name].tobytes() != cut_child[name].tobytes()}
    assert changed == {name for name in child if ".router." in name} and changed
    assert all(".moe.router_" in name for name in record(out)["trained"])
    assert metrics(out)[-1]["evaluation/kl"] < start_of(directory / "child")[1]["kl"]
    # Everything can be trained after that, from what the routers have learnt.
    later = distiller(directory, child=out / "child", train="[router]").inputs.delta()
    assert later is not None and later["layers"][0]["moe"]["router_weight"] is not None


ALL = {"train": "[router,experts]", "loss__forward_kl": 0, "loss__top_k_kl": 1, "top_k": 20}


@pytest.fixture(scope="module")
def trainable(directory, blocks):
    """A run from the child of `blocks` that also trains routers and experts, on cached logits."""
    options = {**ALL, "child": blocks / "child", "teacher_cache": directory / "cache"}
    trained = distilling.distill(
        parse(VERBS["distill"], arguments(directory, directory / "trainable", **options)), QUIET
    )
    return directory / "trainable", trained.state.params, options


def test_trainable_experts_and_routers_go_out_as_they_were_trained(directory, origin, trainable, blocks, start_of):
    out, values, _ = trainable
    layers = unstack_params(values, origin.student.runs)["layers"]
    child = load_checkpoint(out / "child", dtype=jnp.float32, experts="dense")
    parent = load_checkpoint(directory / "parent", dtype=jnp.float32, experts="dense")
    for layer, (trained, exported, of_parent, kept) in enumerate(
        zip(layers, child.params["layers"], parent.params["layers"], map(list, KEPT), strict=True)
    ):
        for name in ("gate_up", "down"):
            found = exported["moe"][name]
            np.testing.assert_array_equal(found, round_to_mxfp4(trained["moe"][name])[np.asarray(kept)])
            np.testing.assert_array_equal(found, round_to_mxfp4(found))
            assert (found != of_parent["moe"][name][np.asarray(kept)]).any(), (layer, name)
        for name, columns in (("router_weight", np.s_[:, kept]), ("router_bias", kept), ("down_bias", kept)):
            rounded = np.asarray(trained["moe"][name].astype(jnp.bfloat16), np.float32)[columns]
            np.testing.assert_array_equal(exported["moe"][name], rounded)
    names = record(out)["trained"]
    assert "layers.0.moe.gate_up" in names and "layers.1.moe.router_weight" in names
    assert [run["blocks"] for run in record(out)["distilled"]] == [True, False]
    assert metrics(out)[-1]["evaluation/kl"] < start_of(blocks / "child")[1]["kl"]
    # What was trained must stay trainable: if it were frozen, it would revert to the parent's values.
    with pytest.raises(PuzzleError, match=r"values of its own for layers\.0\.moe\.\S+, .*name \S+ in train"):
        DistillInputs.open(replace(origin.recipe, child=out / "child"), blocks=False)
    again = distiller(directory, child=out / "child", train="[experts,router]").inputs.delta()
    assert again is not None
    begin, kept, exported = again["layers"][1]["moe"], list(KEPT[1]), child.params["layers"][1]["moe"]
    np.testing.assert_array_equal(begin["gate_up"][kept], exported["gate_up"])
    np.testing.assert_array_equal(begin["router_weight"][:, kept], exported["router_weight"])


def test_a_cache_serves_the_next_run_without_asking_the_teacher(directory, origin, trainable, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the teacher was asked")

    again = distiller(directory, **trainable[2])
    again.__dict__["base"] = origin.base  # the same weights, already loaded
    monkeypatch.setattr(distilling, "make_cache", asked)
    monkeypatch.setattr(Student, "teacher_hidden", asked)
    job = again.job()
    batch = of_type(Packed, next(job.batches))
    assert batch.extras["teacher_ids"].shape == (1, 2, LENGTH, 20)
    counted = batch.weights > 0
    assert (batch.extras["teacher_log_total"][counted] > 0).all()
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    masters = jax.eval_shape(again.student.master_weights, origin.base)
    loss = jax.eval_shape(again.objective(), masters, Fixed(origin.base), first)
    assert set(loss.terms) == {"top_k_kl"}


@pytest.mark.parametrize(
    "changes,field",
    [
        ({"top_k": 19}, "k is 20, but here it is 19"),
        ({"loss__temperature": 2.0}, "temperature is 1.0, but here it is 2.0"),
        ({"data__heldout": 9}, "examples is"),
        ({"parent": "other", "child": "other-child"}, "parent is"),
    ],
)
def test_a_cache_of_something_else_is_refused(directory, trainable, tmp_path, capsys, changes, field):
    options = {**trainable[2], **changes}
    if "parent" in changes:
        save_parent(tmp_path / "other", seed=1)
        cut(tmp_path / "other", tmp_path / "other-child")
        options |= {name: tmp_path / value for name, value in changes.items()}
    said = refusal(capsys, directory, tmp_path / "run", **options)
    assert "holds the cache of another run" in said and field in said


def test_a_padded_child_stays_padded(directory, origin, tmp_path, monkeypatch):
    """Every gpt-oss loader can read it, and must still be able to after training."""
    windows = (BLOCKS[0], BlockConfig(4, None))
    export_child(
        directory / "parent", tmp_path / "child", CONFIG.with_blocks(windows), KEPT, provenance={}, pad_experts=True
    )
    padded = distiller(directory, "padded", child=tmp_path / "child")
    padded.__dict__["base"] = origin.base
    monkeypatch.setattr(Distiller, "_cache_scales", lambda self, trained: None)
    values = jax.tree.map(lambda leaf: leaf + 0.125, padded.student.master_weights(origin.base))
    evaluation = {"evaluation/kl": 0.5, "evaluation/next_token": 2.0}
    state = TrainState(jnp.int32(6), values, (), jax.random.key(0), jnp.int32(0))
    padded.export(Trained(state, 6, 0, False, evaluation, None, None))
    written = describe_checkpoint(directory / "padded" / "child")
    assert [block.num_experts for block in written.config.blocks] == [5, 5]
    assert open_child(directory / "parent", written.directory).child.kept == KEPT
    head = written.tensors["lm_head.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(head, np.asarray(values["head"].T.astype(jnp.bfloat16), np.float32))


# Several processes


SIMPLE = {"remat": "false", "loss__token_chunk": 2 * LENGTH, "loss__vocab_chunk": CONFIG.vocab_size}


@pytest.mark.once
def test_two_processes_train_what_one_does(directory, finished, tmp_path):
    out = tmp_path / "run"
    ended = in_processes(2, "distill", *arguments(directory, out, mesh__data=2, **SIMPLE))
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert ["child: " in process.stderr for process in ended] == [True, False]  # one reports for both
    for line, of_one in zip(metrics(out), metrics(finished), strict=True):
        assert line == pytest.approx(of_one, rel=1e-4)
    child, of_one = stored(out / "child"), stored(finished / "child")
    for name, values in of_one.items():
        found, values = (array.astype(np.float32) for array in (child[name], values))
        np.testing.assert_allclose(found, values, rtol=2**-7, atol=1e-3, err_msg=name)
        assert (found != values).mean() < 0.02 or name.endswith("_scale"), name


@pytest.mark.slow
def test_processes_are_refused_together(directory, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    ended = in_processes(2, "distill", *arguments(directory, tmp_path / "run", mesh__data=2))
    assert [process.returncode for process in ended] == [2, 2], [process.stderr for process in ended]
    assert all("holds files that are no run's (thesis.txt)" in process.stderr for process in ended)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_other_in_a_sentence(directory, tmp_path, lost):
    out = tmp_path / "run"
    one = ["puzzle_jax.train", "distill", *arguments(directory, out, mesh__data=2, loop__steps=100_000, **SIMPLE)]
    with running(*[[*one, "--mesh.processes", "2"]] * 2, XLA_FLAGS=QUICK) as processes:
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.1)
        processes[lost].kill()
        left = ended(processes)[1 - lost]
    assert left.returncode == 1, left.stderr
    last = left.stderr.splitlines()[-1]
    assert last.startswith(f"puzzle train distill: process {lost} (host "), left.stderr
    assert " was lost: " in last and "Traceback" not in left.stderr and "Check failure" not in left.stderr


@pytest.mark.slow
def test_other_settings_and_other_traces_in_one_process_are_refused_by_both(directory, tmp_path):
    one = [
        "puzzle_jax.train",
        "distill",
        *arguments(directory, tmp_path / "run", mesh__data=2),
        "--mesh.processes",
        "2",
    ]
    others = tmp_path / "others.parquet"
    write_traces(others, read_traces(directory / "traces.parquet")[1:])
    for changed, told in (
        (["--optimizer.learning_rate", "0.5"], " in the recipe: optimizer.learning_rate is "),
        (["--traces", str(others)], " in the inputs: data is "),
    ):
        with running(one, [*one, *changed], XLA_FLAGS=QUICK) as processes:
            found = ended(processes)
        assert [process.returncode for process in found] == [2, 2], [process.stderr for process in found]
        assert found[0].stderr.splitlines()[-1] == found[1].stderr.splitlines()[-1]
        assert told in found[0].stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mesh_of_eight_devices_and_packed_experts_train_what_one_does(directory, finished, tmp_path):
    """Runs in its own process, without shape checks, since JAX puts other objects in the place of packed arrays."""
    options = {"mesh__data": 2, "mesh__sequence": 2, "mesh__model": 2, "packed": "true"}
    (ended,) = in_processes(
        1, "distill", *arguments(directory, tmp_path / "run", **options), flags=f"{QUICK} {EIGHT_DEVICES}"
    )
    assert ended.returncode == 0, ended.stderr
    for line, of_one in zip(metrics(tmp_path / "run"), metrics(finished), strict=True):
        assert line == pytest.approx(of_one, rel=1e-4)
