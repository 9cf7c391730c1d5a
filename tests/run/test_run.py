"""A whole run: every stage's files, what is skipped, what reruns, recovery from a kill, and what is reported."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks.pooled_runs import pooled
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.load import known_scales
from puzzle_jax.generate.traces import read_traces, write_traces
from puzzle_jax.run.page import COLUMNS
from puzzle_jax.run.pipeline import right_lengths
from puzzle_jax.run.places import STAGES
from puzzle_jax.run.status import DONE, TO_COME, UNDER_WAY, stage_states
from puzzle_jax.stages import KEPT, STAGE_FILE
from puzzle_jax.status.__main__ import main as status
from tests.run.toy_road import arguments, parent_and_prompts, run_it, settings, summary
from tests.waiting import HANG


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return parent_and_prompts(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def finished(root) -> Path:
    run = root / "run"
    assert run_it(root, run) == 0
    return run


def content(run: Path) -> dict[str, bytes]:
    """Results of a run without seconds and dates: the weights of every child, and all answers."""
    found = {
        path.relative_to(run).as_posix(): path.read_bytes()
        for pattern in ("*/child/*.safetensors", "child/*.safetensors", "child/config.json", "traces/*.parquet")
        for path in run.glob(pattern)
    }
    answers = {f"answers of {p.stem}": p.read_bytes() for p in (run / "evaluate/answers").glob("*.jsonl")}
    lines = {name: b"\n".join(sorted(text.splitlines())) for name, text in answers.items()}
    return found | lines


def test_every_stage_leaves_its_files(finished):
    for path in (
        "settings.yaml",
        "settings/accuracy.yaml",
        "search/report/report.html",
        "traces/answers.parquet",
        "distill/child/model.safetensors",
        "distill/checkpoints",
        "accuracy/report.html",
        "length/child/provenance.json",
        "control/child/model.safetensors",
        "average/child/model.safetensors",
        "evaluate/evaluation.json",
        "evaluate/report.html",
        "child/model.safetensors",
        "child/README.md",
        "report/report.html",
        "report/report.md",
        "report/figures/frontier.png",
    ):
        assert (finished / path).exists(), path
    assert not list(finished.glob(f".*{KEPT}*"))
    assert list(summary(finished)["seconds"]) == list(STAGES[:-1])


def test_the_length_policys_budgets_are_the_lengths_of_right_answers(finished):
    traces = read_traces(finished / "traces/answers.parquet")
    of_high = [len(t.completion) for t in traces if t.effort == "high" and t.reward == 1.0]
    budgets = right_lengths(finished / "traces/answers.parquet", ("low", "medium", "high"))
    assert budgets["high"] == round(float(np.mean(of_high)))
    record = json.loads((finished / "length/child/provenance.json").read_text())
    assert record["grpo"][-1]["loss"]["length_budgets"] == budgets


def test_the_child_to_serve_is_the_average_with_its_own_scales_and_card(finished, root):
    child, average = finished / "child", finished / "average/child"
    assert (child / "model.safetensors").read_bytes() == (average / "model.safetensors").read_bytes()
    scales = known_scales(describe_checkpoint(child))
    assert scales is not None and np.isfinite(scales).all() and (scales > 0).all()
    card = (child / "README.md").read_text()
    head = card.split("---")[1]
    assert 'base_model: "parent"' in head
    assert "final answers" in card and "| high: accuracy |" in card and "all: difference" in card
    assert "layers.0." not in card  # no lists of tensors
    assert "Trained after the cut: attention, embedding, head, norms" in card


def test_evaluation_asks_rows_that_nothing_else_has_seen(finished):
    def prompts(of: str) -> set[int]:
        return {t.problem_seed for t in read_traces(finished / of)}

    judged = prompts("evaluate/answers/parent.jsonl")
    assert judged and judged.isdisjoint(prompts("traces/answers.parquet"))
    for name in ("calibration", "validation", "confirmation", "heldout"):
        assert judged.isdisjoint(prompts(f"search/traces/{name}.parquet"))


def test_the_final_model_is_evaluated_with_its_fp8_cache(finished):
    evaluation = json.loads((finished / "evaluate/evaluation.json").read_text())
    assert evaluation["settings"]["cache_dtypes"] == {"final": "float8_e4m3fn"}
    batches = evaluation["throughput"]["workloads"]["toy"]
    assert batches["final"]["batch"] >= batches["average"]["batch"]


def test_runs_pool_to_what_each_found(finished, tmp_path):
    found = json.loads((finished / "evaluate/evaluation.json").read_text())
    one = pooled([finished / "evaluate"], COLUMNS)
    assert one["overall"] == found["overall"] and one["summaries"] == found["summaries"]
    for name, comparison in found["comparisons"].items():
        assert one["comparisons"][name]["efforts"]["high"]["all"] == comparison["efforts"]["high"]["all"]
    again = shutil.copytree(finished / "evaluate", tmp_path / "again")
    with pytest.raises(SystemExit, match="give runs of different seeds"):
        pooled([finished / "evaluate", again], COLUMNS)
    for file in (again / "answers").iterdir():
        moved = [replace(trace, problem_seed=trace.problem_seed + 1_000_000) for trace in read_traces(file)]
        write_traces(file, moved)
    both = pooled([finished / "evaluate", again], ["parent", "final"])
    assert list(both["summaries"]) == ["parent", "final"]
    for effort, pooled_summary in both["summaries"]["final"].items():
        alone = one["summaries"]["final"][effort]["all"]
        assert (pooled_summary["all"]["answers"], pooled_summary["all"]["accuracy"]) == (
            2 * alone["answers"],
            alone["accuracy"],
        )
        rounds = both["throughput"]["workloads"][effort]["final"]["tokens_per_second"]["rounds"]
        assert rounds == 2 * found["throughput"]["workloads"][effort]["final"]["tokens_per_second"]["rounds"]


def test_an_unchanged_run_is_skipped_and_leaves_no_arrays(finished, root, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob(STAGE_FILE)}
    held = len(jax.live_arrays())
    assert run_it(root, finished) == 0
    said = capsys.readouterr().out
    assert said.count("unchanged, skipped") == len(STAGES) + 10  # the search has ten stages of its own
    assert {path: path.stat().st_mtime_ns for path in finished.rglob(STAGE_FILE)} == before
    assert len(jax.live_arrays()) <= held


def test_status_tells_what_is_done_and_what_comes_next(finished, tmp_path, capsys):
    assert [(stage.name, stage.state) for stage in stage_states(finished)] == [(name, DONE) for name in STAGES]
    assert status([str(finished), "--price_per_gpu_hour", "2"]) == 0
    said = capsys.readouterr().out
    assert f"the child to serve is {finished}/child" in said.replace("\n", "")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "settings.yaml").write_text((finished / "settings.yaml").read_text())
    kept = begun / f".distill{KEPT}0123"
    kept.mkdir()
    (kept / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    found = {stage.name: stage for stage in stage_states(begun)}
    assert found["search"].state == TO_COME and found["accuracy"].state == TO_COME
    assert (found["distill"].state, found["distill"].note) == (UNDER_WAY, "step 2 of 3")
    assert status([str(begun), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next"] == "search"
    assert status([str(tmp_path)]) == 2
    assert "is no run: it holds no settings.yaml" in capsys.readouterr().err


def test_a_stage_alone_is_run_by_its_name_and_needs_those_before(finished, root, tmp_path, capsys):
    assert run_it(root, finished, stage="length") == 0
    assert capsys.readouterr().out.count("unchanged, skipped") == 1
    assert run_it(root, tmp_path / "new", stage="distill") == 2
    assert "stage 'distill' needs" in capsys.readouterr().err


def test_another_parent_is_refused(finished, root, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in (root / "model").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert run_it(root, finished, parent=other) == 2
    assert "holds another run (parent" in capsys.readouterr().err


def _kill_and_finish(root: Path, finished: Path, run: Path, seed: int, missing: int) -> None:
    """Starts a run that lacks `missing` stages from a random one on, kills it at a random moment, and finishes it."""
    rng = random.Random(seed)
    stage = rng.choice(STAGES[1:])
    shutil.copytree(finished, run)
    first = STAGES.index(stage)
    for name in STAGES[first : first + missing]:
        shutil.rmtree(run / ("child" if name == "export" else name))
    command = [sys.executable, "-m", "puzzle_jax.run", *arguments(root, run)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == stage:
            break
    try:
        process.wait(timeout=3 * rng.random())
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.stdout.read()
    process.wait(timeout=HANG)
    assert run_it(root, run) == 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("seeds", "missing"),
    # Two stages suffice to cross from one to the next; those after them are skipped if these end in the same files.
    [(range(1), 2), pytest.param(range(1, 30), len(STAGES), marks=pytest.mark.slow)],
)
def test_a_killed_run_ends_in_the_same_files(finished, root, tmp_path, seeds, missing):
    wanted = content(finished)
    assert len(wanted) > 12
    for seed in seeds:
        run = tmp_path / f"killed-{seed}"
        _kill_and_finish(root, finished, run, seed, missing)
        assert content(run) == wanted


@pytest.mark.once
def test_a_changed_setting_reruns_what_follows_from_it(finished, root, capsys):
    # Tests that rewrite files of the shared run come last.
    assert run_it(root, finished, average__weights="1,0.25") == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    again = [words[0] for words in said if len(words) == 3 and words[2] == "s" and words[0] in STAGES]
    assert again == ["average", "evaluate", "export", "report"]
    assert settings(root, finished).average.weights == (0.5, 1.0)
