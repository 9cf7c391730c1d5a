"""Distillation from directories to a trained child's directory: values, resumption, and what is refused."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
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
from puzzle_jax.convert_hf.export import export_child, save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace, write_traces
from puzzle_jax.model.stacked import unstack_params
from puzzle_jax.runs import open_run
from puzzle_jax.tasks.tokenizer import chat_files
from puzzle_jax.train import distill as distilling
from puzzle_jax.train.__main__ import RECIPE_VERBS, VERBS, main
from puzzle_jax.train.distill import Distiller
from puzzle_jax.train.distill_command import parse_recipe
from puzzle_jax.train.distill_inputs import Inputs, apart
from puzzle_jax.train.fake_quant import round_to_mxfp4
from puzzle_jax.train.loop import Summary, Trained
from puzzle_jax.train.objectives import Fixed
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.step import TrainState
from puzzle_jax.train.student import Student
from puzzle_jax.train.trace_examples import examples_of
from tests.support import chat_config, model_logits, random_params

CONFIG = chat_config()
BLOCKS = (BlockConfig(5, 16), BlockConfig(4, 24))
KEPT = ((0, 2, 3, 5, 7), (1, 2, 4, 6))
LENGTH = 40
SETTINGS = {
    "--data.row_length": LENGTH,
    "--data.rows": 2,
    "--data.heldout": 5,
    "--loss.token_chunk": 32,
    "--loss.vocab_chunk": 48,
    "--optimizer.learning_rate": 0.01,
    "--loop.steps": 6,
    "--loop.evaluate_every": 2,
    "--loop.save_every": 2,
    "--loop.log_every": 1,
}
QUIET = Console(quiet=True)


def random_trace(number: int, vocabulary: int = CONFIG.vocab_size, prompt: int | None = None) -> Trace:
    rng = np.random.default_rng(number if prompt is None else prompt)
    words = tuple(rng.integers(0, vocabulary, 5 + number % 4).tolist())
    answer = tuple(np.random.default_rng([number]).integers(0, vocabulary, 9 + number % 7).tolist())
    return Trace(("add", "chain")[number % 2], "low", number, {}, words, answer, reward=None, truncated=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """parent/, child/ and traces.parquet."""
    root = tmp_path_factory.mktemp("distill")
    save_checkpoint(root / "parent", CONFIG, random_params(CONFIG), config_base={}, extra_files=chat_files())
    cut(root / "parent", root / "child")
    # Many, since grain takes milliseconds to shuffle few.
    write_traces(root / "traces.parquet", [random_trace(number) for number in range(240)])
    return root


def cut(parent: Path, out: Path, **options) -> None:
    config = CONFIG.with_blocks(BLOCKS)
    export_child(parent, out, config, KEPT, provenance={"search": {"score": 0.25}}, **options)


def arguments(directory: Path, out: Path, **changes) -> list[str]:
    """Of a command line, but for the verb; `changes` are settings, with __ for dots, and None leaves one out."""
    settings = {
        "--parent": directory / "parent",
        "--child": directory / "child",
        "--traces": directory / "traces.parquet",
        **SETTINGS,
        "--out": out,
    }
    settings |= {f"--{name.replace('__', '.')}": value for name, value in changes.items()}
    return [str(part) for name, value in settings.items() if value is not None for part in (name, value)]


def distiller(directory: Path, blocks: bool = False, **changes) -> Distiller:
    recipe = parse_recipe(arguments(directory, directory / "nowhere", **changes), "test")
    return Distiller(Inputs.open(recipe, blocks=blocks), Placement())


def metrics(out: Path) -> list[dict]:
    """Lines of metrics.jsonl without times."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def stored(checkpoint: Path) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in describe_checkpoint(checkpoint).tensors.items()}


def record(out: Path) -> dict:
    return json.loads((out / "child" / "provenance.json").read_text())


@pytest.fixture(scope="module")
def finished(directory) -> Path:
    out = directory / "finished"
    assert main(["distill", *arguments(directory, out)]) == 0
    return out


@pytest.fixture(scope="module")
def origin(directory) -> Distiller:
    """Of the child as it was cut."""
    return distiller(directory)


@pytest.fixture(scope="module")
def start_of(origin):
    """From a child's directory to the values that its training begins with, and their metrics."""
    masters = jax.jit(origin.student.masters)

    def start(child: Path):
        differing = open_child(origin.recipe.parent, child).differing
        values = masters(origin.resident, load_delta(origin.recipe.parent, child, differing))
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
    # To the rounding of the export to bfloat16, and exactly what its values come to in the trainer.
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
    np.testing.assert_array_equal(child.kv_scales.k, np.float32(scales["k"]))


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


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_bits(directory, finished, tmp_path, kills):
    out, source = tmp_path / "run", random.Random(kills)
    command = [sys.executable, "-m", "tests.train.distill_run"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def interrupted(*moment: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *map(str, moment), *arguments(directory, out)], env=environment, capture_output=True, text=True
        )

    stopped = interrupted("SIGTERM", 2, 0)
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped at step 3 of 6; the same command goes on" in stopped.stdout + stopped.stderr
    assert [line["step"] for line in metrics(out)] == [1, 2, 3] and not (out / "child").exists()
    for _ in range(kills):
        interrupted("SIGKILL", source.randint(3, 6), source.uniform(0, 0.5))
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
    # Its child is where distillation can begin, nearer to the parent than the one that was cut.
    _, found = start_of(blocks / "child")
    assert found["kl"] == pytest.approx(lines[-1]["evaluation/kl"], rel=0.01)
    assert found["kl"] < start_of(directory / "child")[1]["kl"]


ALL = {"train": "[router,experts]", "packed": "true", "loss__forward_kl": 0, "loss__top_k_kl": 1, "top_k": 20}


@pytest.fixture(scope="module")
def freed(directory, blocks):
    """Routers and experts learn, too, from cached logits, on packed weights; on from the child of `blocks`."""
    options = {**ALL, "child": blocks / "child", "teacher_cache": directory / "cache"}
    trained = distilling.distill(parse_recipe(arguments(directory, directory / "freed", **options), "test"), QUIET)
    return directory / "freed", trained.state.params, options


def test_freed_experts_and_routers_go_out_as_they_were_trained(directory, origin, freed, blocks, start_of):
    out, values, _ = freed
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
            rounded = np.asarray(trained["moe"][name][columns].astype(jnp.bfloat16), np.float32)
            np.testing.assert_array_equal(exported["moe"][name], rounded)
    names = record(out)["trained"]
    assert "layers.0.moe.gate_up" in names and "layers.1.moe.router_weight" in names
    assert [run["blocks"] for run in record(out)["distilled"]] == [True, False]
    assert metrics(out)[-1]["evaluation/kl"] < start_of(blocks / "child")[1]["kl"]
    # What was trained must go on being trained: frozen, it would be the parent's again.
    with pytest.raises(PuzzleError, match=r"values of its own for layers\.0\.moe\.\S+, .*name \S+ in train"):
        Inputs.open(replace(origin.recipe, child=out / "child"), blocks=False)
    opened = distiller(directory, child=out / "child", train="[experts,router]")
    begun = opened.student.delta(jax.jit(opened.student.masters)(origin.resident, opened.inputs.delta()))
    moe = begun["layers"][1]["moe"]
    np.testing.assert_array_equal(moe["gate_up"][list(KEPT[1])], child.params["layers"][1]["moe"]["gate_up"])
    np.testing.assert_array_equal(moe["router_weight"][:, KEPT[1]], child.params["layers"][1]["moe"]["router_weight"])


def test_a_cache_serves_the_next_run_without_asking_the_teacher(directory, origin, freed, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("the teacher was asked")

    again = distiller(directory, **freed[2])
    again.__dict__["resident"] = origin.resident  # which is the same, and there already
    monkeypatch.setattr(distilling, "make_cache", asked)
    monkeypatch.setattr(Student, "teacher_hidden", asked)
    job = again.job(QUIET)
    batch = next(job.batches)
    assert batch.extras["teacher_ids"].shape == (1, 2, LENGTH, 20)
    counted = batch.weights > 0
    assert (batch.extras["teacher_log_total"][counted] > 0).all()
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    masters = jax.eval_shape(again.student.masters, origin.resident)
    loss = jax.eval_shape(again.objective(), masters, Fixed(origin.resident), first)
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
def test_a_cache_of_something_else_is_refused(directory, freed, tmp_path, capsys, changes, field):
    options = {**freed[2], **changes}
    if "parent" in changes:
        save_checkpoint(
            tmp_path / "other", CONFIG, random_params(CONFIG, seed=1), config_base={}, extra_files=chat_files()
        )
        cut(tmp_path / "other", tmp_path / "other-child")
        options |= {name: tmp_path / value for name, value in changes.items()}
    said = refusal(capsys, directory, tmp_path / "run", **options)
    assert "holds the cache of another run" in said and field in said


def test_a_padded_child_stays_padded(directory, origin, tmp_path, monkeypatch):
    """Every loader of gpt-oss reads it, and so it shall be after training."""
    windows = (BLOCKS[0], BlockConfig(4, None))
    export_child(
        directory / "parent", tmp_path / "child", CONFIG.with_blocks(windows), KEPT, provenance={}, pad_experts=True
    )
    padded = distiller(directory, child=tmp_path / "child", out=tmp_path / "run")
    padded.__dict__["resident"] = origin.resident
    monkeypatch.setattr(Distiller, "_cache_scales", lambda self, trained: None)
    values = jax.tree.map(lambda leaf: leaf + 0.125, padded.student.masters(origin.resident))
    evaluation = {"evaluation/kl": 0.5, "evaluation/next_token": 2.0}
    summary = Summary(6, 0, False, 1.0, evaluation, None, None)
    padded.export(Trained(TrainState(jnp.int32(6), values, (), jax.random.key(0), jnp.int32(0)), summary), QUIET)
    written = describe_checkpoint(tmp_path / "run" / "child")
    assert [block.num_experts for block in written.config.blocks] == [5, 5]
    assert open_child(directory / "parent", tmp_path / "run" / "child").child.kept == KEPT
    head = written.tensors["lm_head.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(head, np.asarray(values["head"].T.astype(jnp.bfloat16), np.float32))


# Several processes


def in_processes(count: int, *command: str, flags: str = "") -> list[subprocess.CompletedProcess]:
    """A distillation that is started once per process, as on several hosts with a device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "puzzle_jax.train", "distill", *command, "--mesh.processes", str(count)],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]


# Compilation is most of what such a test costs; what is left out changes no value by more than rounding.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def test_two_processes_train_what_one_does(directory, finished, tmp_path):
    out = tmp_path / "run"
    ended = in_processes(2, *arguments(directory, out, mesh__data=2), flags=QUICK_TO_COMPILE)
    assert [process.returncode for process in ended] == [0, 0], [process.stderr for process in ended]
    assert ["child: " in process.stderr for process in ended] == [True, False]  # one tells of both
    for line, of_one in zip(metrics(out), metrics(finished), strict=True):
        assert line == pytest.approx(of_one, rel=2e-5)
    child, of_one = stored(out / "child"), stored(finished / "child")
    for name, values in of_one.items():
        found, values = (array.astype(np.float32) for array in (child[name], values))
        np.testing.assert_allclose(found, values, rtol=2**-7, atol=1e-3, err_msg=name)
        assert (found != values).mean() < 0.02 or name.endswith("_scale"), name


@pytest.mark.slow
def test_processes_are_refused_together(directory, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    ended = in_processes(2, *arguments(directory, tmp_path / "run", mesh__data=2))
    assert [process.returncode for process in ended] == [2, 2], [process.stderr for process in ended]
    assert all("holds files that are no run's (thesis.txt)" in process.stderr for process in ended)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_trains_what_one_does(directory, finished, tmp_path):
    options = {"mesh__data": 2, "mesh__sequence": 2, "mesh__model": 2, "packed": "true"}
    assert main(["distill", *arguments(directory, tmp_path / "run", **options)]) == 0
    for line, of_one in zip(metrics(tmp_path / "run"), metrics(finished), strict=True):
        assert line == pytest.approx(of_one, rel=2e-5)


# What is refused


def refusal(capsys, directory: Path, out: Path, verb: str = "distill", **changes) -> str:
    """The sentence with which a command is refused, after which nothing new stands at `out`."""
    before = sorted(out.rglob("*")) if out.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "load_checkpoint", None)  # weights are not read
        assert main([verb, *arguments(directory, out, **changes)]) == 2
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(f"python -m puzzle_jax.train {verb}: "), said
    return said.removeprefix(f"python -m puzzle_jax.train {verb}: ")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"parent": "nowhere"}, "nowhere"),
        ({"child": "nowhere"}, "nowhere is not a directory"),
        ({"traces": "nowhere.parquet"}, "nowhere.parquet cannot be read"),
        ({"traces": "[]"}, "traces is empty"),
        ({"parent": None}, "parent"),
        ({"recipe": "distill-huge"}, "but there is no such file, and the names are distill-tiny"),
        ({"colour": "blue"}, "colour"),
        ({"loss__colour": "blue"}, "colour"),
        ({"train": "[norms]"}, "train has 'norms', but must be of router, experts"),
        ({"train": "router"}, "train"),
        ({"top_k": 0}, "top_k is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1, but must be from 0"),
        ({"seed": 2**40}, "seed is 1099511627776, but must be from 0"),
        ({"remat": "perhaps"}, "remat"),
        ({"data__rows": 0}, "data.rows is 0, but must be at least 1"),
        ({"data__rows": 1.5}, "data.rows"),
        ({"data__row_length": 1}, "data.row_length is 1, but must be at least 2"),
        ({"data__heldout": 0}, "data.heldout is 0, but must be at least 1"),
        ({"data__heldout": 1000}, "data.heldout is 1000, which leaves nothing to train on"),
        ({"data__seed": -3}, "data.seed is -3"),
        ({"data__over_long": "shrink"}, "data.over_long"),
        ({"data__over_long": "refuse", "data__row_length": 19}, "tokens, but row_length is 19"),
        ({"data__row_length": 9}, "row_length is 9, but the shortest example"),
        ({"data__task_weights": "{poetry: 2}"}, "task_weights names 'poetry', but the traces have only add, chain"),
        ({"data__task_weights": "{add: -1}"}, "data.task_weights gives 'add' -1"),
        ({"data__effort_weights": "{low: .nan}"}, "data.effort_weights gives 'low' nan"),
        ({"data__effort_weights": "{extreme: 1}"}, "extreme"),
        ({"loss__forward_kl": -1}, "loss.forward_kl is -1"),
        ({"loss__forward_kl": ".nan"}, "loss.forward_kl is nan"),
        ({"loss__forward_kl": 0}, "all terms of loss are 0"),
        ({"loss__temperature": 0}, "loss.temperature is 0"),
        ({"loss__vocab_chunk": 0}, "loss.vocab_chunk is 0"),
        ({"loss__top_k_kl": 1}, "loss.top_k_kl is 1.0 and teacher_cache is None, but the one needs the other"),
        ({"teacher_cache": "cache"}, "loss.top_k_kl is 0.0 and teacher_cache is cache, but the one needs the other"),
        ({"optimizer__name": "magic"}, "optimizer.name is 'magic'"),
        ({"optimizer__learning_rate": ".inf"}, "optimizer.learning_rate is inf"),
        ({"optimizer__warmup_steps": 7}, "optimizer.warmup_steps is 7, but must be at most loop.steps (6)"),
        ({"optimizer__b2": 1}, "optimizer.b2 is 1"),
        ({"loop__steps": 0}, "loop.steps is 0"),
        ({"loop__save_every": "often"}, "loop.save_every"),
        ({"mesh__data": 0}, "mesh.data is 0"),
        ({"mesh__data": 3}, "data.rows is 2, but must be a multiple of mesh.data (3)"),
        ({"mesh__sequence": 3}, "data.row_length is 40, but must be a multiple of mesh.sequence (3)"),
        ({"mesh__model": 99}, "needs 99 devices, but 8 are present"),
        ({"mesh__processes": 2}, "mesh has 1 devices (data x sequence x model), but must have a multiple of"),
    ],
)
def test_bad_settings_are_one_sentence_before_weights_are_read(directory, tmp_path, capsys, changes, message):
    assert message in refusal(capsys, directory, tmp_path / "run", **changes)


def test_children_that_were_not_cut_from_this_parent_are_refused(directory, tmp_path, capsys):
    shutil.copytree(directory / "child", tmp_path / "unrecorded")
    (tmp_path / "unrecorded" / "provenance.json").unlink()
    shutil.copytree(directory / "child", tmp_path / "foreign")
    words = (tmp_path / "foreign" / "tokenizer.json").read_bytes()
    (tmp_path / "foreign" / "tokenizer.json").write_bytes(words + b" ")
    save_checkpoint(tmp_path / "other", CONFIG, random_params(CONFIG, 1), config_base={}, extra_files=chat_files())
    cut(tmp_path / "other", tmp_path / "of-other")
    for name, message in (
        ("unrecorded", "has no provenance.json"),
        ("foreign", "tokenizer.json is not the parent's"),
        ("of-other", "differs in row"),
    ):
        said = refusal(capsys, directory, tmp_path / "run", child=tmp_path / name)
        assert message in said and str(tmp_path / name) in said


def test_values_that_freezing_would_lose_are_refused(directory, tmp_path, capsys):
    nothing = {"attention": {}, "moe": {}}
    router = {"layers": [nothing, {"attention": {}, "moe": {"router_bias": np.arange(8, dtype=np.float32)}}]}
    head = {"layers": [nothing, nothing], "head": np.ones((CONFIG.hidden_size, CONFIG.vocab_size), np.float32)}
    cut(directory / "parent", tmp_path / "router", dense_delta=router)
    cut(directory / "parent", tmp_path / "head", dense_delta=head)
    said = refusal(capsys, directory, tmp_path / "run", child=tmp_path / "router")
    assert "values of its own for layers.1.moe.router_bias" in said and "name router in train" in said
    said = refusal(capsys, directory, tmp_path / "run", "distill-blocks", child=tmp_path / "head")
    assert "values of its own for head" in said and "train it as a whole, not its blocks" in said


def test_traces_that_nothing_can_be_learnt_from_are_refused(directory, tmp_path, capsys):
    write_traces(tmp_path / "empty.parquet", [])
    write_traces(tmp_path / "foreign.parquet", [random_trace(3), random_trace(4, vocabulary=200_000)])
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("empty.parquet", "holds no trace"),
        ("foreign.parquet", "but the model's tokens are 0 to 127"),
        ("folder", "holds no file of traces"),
    ):
        said = refusal(capsys, directory, tmp_path / "run", traces=tmp_path / name)
        assert message in said and str(tmp_path / name) in said
    twice = f"[{directory / 'traces.parquet'}, {directory / 'traces.parquet'}]"
    assert "twice, but every file must come once" in refusal(capsys, directory, tmp_path / "run", traces=twice)


def test_directories_that_hold_something_else_are_refused_and_kept(directory, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    cached = {"loss__top_k_kl": 1, "teacher_cache": tmp_path / "foreign"}
    for name, changes, message in (
        ("foreign", {}, "holds files that are no run's (thesis.txt)"),
        ("file", {}, "is a file, but must be a directory"),
        ("run", {"seed": 7}, "holds another run (seed 0 -> 7)"),
        ("run", {"child": tmp_path / "run" / "child"}, "holds another run (child"),
        ("new", cached, "holds files that are no teacher's cache"),
        ("new", {**cached, "teacher_cache": tmp_path / "file"}, "is a file, but must be a directory for the teacher"),
    ):
        assert message in refusal(capsys, directory, tmp_path / name, **changes)
    assert "holds another run (data" in refusal(capsys, directory, tmp_path / "run", "distill-blocks", data__seed=1)
    said = refusal(capsys, directory, tmp_path / "new", "distill-blocks", **cached)
    assert "layers that train alone read no logits" in said
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "years of work"


# Parts


def test_all_answers_to_a_prompt_are_on_one_side(origin):
    prompts = [random_trace(number, prompt=number % 7) for number in range(0, 70, 4)]
    settings = replace(origin.inputs.settings, row_length=64)
    examples = examples_of(prompts, settings, CONFIG.vocab_size).examples
    for heldout in (1, 4, 9):
        training, held = apart(examples, heldout, settings)
        of_training, of_held = ({e.tokens[: e.prompt_length].tobytes() for e in side} for side in (training, held))
        assert len(held) >= heldout and not of_training & of_held
        assert sorted(map(id, [*training, *held])) == sorted(map(id, examples))
        reordered = apart(examples[::-1], heldout, settings)[1]
        assert set(map(id, reordered)) == set(map(id, held))
    others = apart(examples, 4, replace(settings, seed=1))[1]
    assert set(map(id, others)) != set(map(id, apart(examples, 4, settings)[1]))


def test_templates_see_the_day_on_which_the_run_was_begun(directory, origin, tmp_path):
    """Or traces of text would be others tomorrow, and the run would not go on."""
    identity = {**origin.inputs.identity, "today": "2024-02-29"}
    open_run(tmp_path / "run", identity)
    again = Inputs.open(replace(origin.recipe, out=tmp_path / "run"), blocks=False)
    assert again.identity["today"] == "2024-02-29" and again.chat.today.year == 2024
    open_run(tmp_path / "run", again.identity)


def test_the_tiny_recipe_and_single_or_several_files_of_traces():
    given = ["--parent", "p", "--child", "c", "--out", "o", "--recipe", "distill-tiny"]
    recipe = parse_recipe([*given, "--traces", "a.parquet", "--loop.steps", "900"], "test")
    assert recipe.trace_paths == (Path("a.parquet"),)
    assert (recipe.loop.steps, recipe.loop.save_every, recipe.optimizer.warmup_steps) == (900, 200, 30)
    assert parse_recipe([*given, "--traces", "[a, b.jsonl]"], "test").trace_paths == (Path("a"), Path("b.jsonl"))


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in (*RECIPE_VERBS, *VERBS))])
def test_help_says_what_there_is(capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "usage: python -m puzzle_jax.train" in said
    for name in [*RECIPE_VERBS, *VERBS] if len(arguments) == 1 else {"distill": ["--loop.steps"]}.get(arguments[0], []):
        assert name in said
