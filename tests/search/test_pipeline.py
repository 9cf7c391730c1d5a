"""The whole search on a random two-layer parent, its stages, and what it refuses."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from puzzle_jax.convert_hf.config_json import is_plain
from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.spec import init_params
from puzzle_jax.search.__main__ import main
from puzzle_jax.search.pipeline import STAGES
from puzzle_jax.tasks.tokenizer import chat_files
from tests.support import chat_config

SETTINGS = [
    *("--traces.tasks", '["chain"]', "--traces.calibration", "3", "--traces.validation", "2", "--traces.heldout", "2"),
    *("--traces.max_tokens", "{low: 5, medium: 6, high: 7}", "--traces.batch_size", "9"),
    *("--space.fractions", "[1, 0.75, 0.5]", "--space.windows", "[24]"),
    *("--scenario.input_tokens", "40", "--scenario.output_tokens", "8", "--scenario.batch", "3"),
    *("--target.max_expert_bytes_ratio", "0.8", "--target.min_speedup", "1.0"),
    *("--solve.solutions", "3", "--evaluate.problems", "2", "--evaluate.rounds", "2", "--costs", "roofline"),
    *("--scenario.hardware", "h100"),
]


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    config = chat_config()
    out = tmp_path_factory.mktemp("parent") / "checkpoint"
    save_checkpoint(out, config, init_params(config, jax.random.key(0)), config_base={}, extra_files=chat_files())
    return out


def search(parent: Path, run: Path, *arguments: str) -> int:
    stage = [arguments[0]] if arguments and arguments[0] in STAGES else []
    return main([*stage, "--parent", str(parent), "--run", str(run), *SETTINGS, *arguments[len(stage) :]])


@pytest.fixture(scope="module")
def finished(parent, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("search") / "run"
    assert search(parent, run) == 0
    return run


def test_every_stage_leaves_its_file(finished):
    for path in (
        "cost/costs.json",
        "traces/calibration.parquet",
        "rank/ranking.safetensors",
        "score/scores.json",
        "solve/solutions.json",
        "child/model.safetensors",
        "child/provenance.json",
        "evaluate/evaluation.json",
        "report/report.md",
    ):
        assert (finished / path).is_file(), path


def test_the_child_is_what_was_chosen_and_meets_the_target(finished, parent):
    solutions = json.loads((finished / "solve/solutions.json").read_text())
    measured = [entry["validation"]["kl"] for entry in solutions["pool"]]
    assert solutions["chosen"] == int(np.argmin(measured))
    chosen = solutions["pool"][solutions["chosen"]]
    child = load_checkpoint(finished / "child")
    layers = [(b.num_experts, b.window) for b in child.config.blocks]
    assert layers == [(x["num_local_experts"], x["sliding_window"]) for x in chosen["layers"]]
    evaluation = json.loads((finished / "evaluate/evaluation.json").read_text())
    assert evaluation["child"]["expert_bytes"] <= 0.8 * evaluation["parent"]["expert_bytes"]
    # Scales of the FP8 cache, two of four bytes per layer, are no part of an architecture; plain children carry none.
    scales = 0 if is_plain(child.config) else 2 * 4 * child.config.num_layers
    assert evaluation["child"]["checkpoint_bytes"] + scales == load_bytes(finished / "child")
    kv_scales = json.loads((finished / "child/provenance.json").read_text())["kv_scales"]
    assert len(kv_scales["k"]) == child.config.num_layers and min(kv_scales["k"]) > 0
    assert is_plain(child.config) or child.kv_scales is not None
    assert evaluation["parent"]["checkpoint_bytes"] == load_bytes(parent)
    assert evaluation["parent"]["heldout"]["kl"] < 1e-6 < evaluation["child"]["heldout"]["kl"]
    assert evaluation["child"]["predicted_kl"] == pytest.approx(chosen["score"])


def load_bytes(directory: Path) -> int:
    """Bytes of all tensors, from the file's own header."""
    raw = (directory / "model.safetensors").read_bytes()
    header = int.from_bytes(raw[:8], "little")
    return len(raw) - 8 - header


def test_the_report_holds_every_model_and_layer(finished):
    text = (finished / "report/report.md").read_text()
    for name in (
        "parent",
        "child",
        "uniform",
        "experts only",
        "windows only",
        "held-out KL",
        "layer  1",
        "accuracy, low",
    ):
        assert name in text, name


def test_a_second_run_does_nothing(finished, parent, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert search(parent, finished) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out.count("unchanged, skipped") == len(STAGES)


def test_one_stage_runs_alone_and_a_changed_setting_reruns_what_follows(finished, parent, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert search(parent, run, "solve", "--solve.solutions", "1") == 0
    assert "skipped" not in capsys.readouterr().out
    assert len(json.loads((run / "solve/solutions.json").read_text())["pool"]) == 1


def test_an_infeasible_target_names_the_limit_and_keeps_what_was_solved(finished, parent, tmp_path, capsys):
    """Elsewhere an infeasible program writes an empty result, and a later stage fails for another reason."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert search(parent, run, "solve", "--target.min_speedup", "50") == 2
    said = capsys.readouterr().err
    assert "speed-up" in said and "the best reachable" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_stage_without_its_inputs_says_what_to_do(parent, tmp_path, capsys):
    assert search(parent, tmp_path / "run", "rank") == 2
    message = capsys.readouterr().err
    assert "calibration.parquet is missing; run the stages before it" in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--target.min_speedup", "50"), "the target cannot be met: speed-up"),
        (("--target.max_expert_bytes_ratio", "0.2"), "the target cannot be met: expert bytes ratio 0.2"),
        (("--target.max_expert_bytes_ratio", "1.5"), "max_expert_bytes_ratio"),
        (("--traces.tasks", '["poetry"]'), "task is 'poetry', but must be one of chain"),
        (("--scenario.batch", "0"), "batch"),
        (("--space.divisor", "0"), "divisor is 0"),
        (("--no-such-setting=1",), "no-such-setting"),
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_bad_settings_are_one_sentence_and_harm_nothing(parent, tmp_path, capsys, arguments, message):
    assert search(parent, tmp_path / "run", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "traces").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "no weights", "unknown model_type", "no tokenizer"])
def test_a_damaged_parent_is_refused_before_anything_is_written(parent, tmp_path, capsys, damage):
    copy = tmp_path / "parent"
    if damage != "missing":
        shutil.copytree(parent, copy)
    if damage == "truncated":
        raw = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    elif damage == "unknown model_type":
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    elif damage == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    assert search(copy, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(copy) in message, message
    assert not (tmp_path / "run").exists()


def test_a_directory_of_another_run_is_refused_and_kept(finished, parent, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert search(other, run) == 2
    assert "holds another run" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert search(parent, foreign) == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
