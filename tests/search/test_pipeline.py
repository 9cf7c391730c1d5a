"""The whole search on a random two-layer parent, its stages, and what it refuses."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from puzzle_jax.convert_hf.configuration.config_json import is_plain
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.table import read_costs
from puzzle_jax.errors import PuzzleWarning
from puzzle_jax.evaluate.accuracy import answer_questions
from puzzle_jax.generate.traces import read_traces, write_traces
from puzzle_jax.search.finalists.training import ShortDistillation
from puzzle_jax.search.hours.measured import read_measured
from puzzle_jax.search.pipeline import STAGE_NAMES
from tests.compiler_flags import EIGHT_DEVICES, QUICK
from tests.search.toy_search import SETTINGS, TIMELESS, save_parent, search
from tests.waiting import HANG

SLOW = pytest.mark.slow


def test_every_stage_leaves_its_file(finished):
    for path in (
        "cost/costs.json",
        "traces/calibration.parquet",
        "rank/ranking.safetensors",
        "score/scores.json",
        "rank/agreement.json",
        "solve/solutions.json",
        "refine/refined.json",
        "child/model.safetensors",
        "child/provenance.json",
        "evaluate/evaluation.json",
        "report/report.md",
    ):
        assert (finished / path).is_file(), path


def test_what_every_stage_took_is_kept(finished):
    measured = read_measured(finished)
    assert [stage.name for stage in measured.stages] == list(STAGE_NAMES)
    assert all(stage.seconds > stage.compile_seconds >= 0 for stage in measured.stages)
    predicted = [stage.name for stage in measured.stages if stage.roofline_seconds > 0]
    assert predicted == ["trace", "rank", "score", "solve", "refine", "assemble", "evaluate"]
    assert sum(stage.compile_seconds for stage in measured.stages) > 0
    assert 0 < measured.answer_share <= 1


def test_the_child_is_what_was_chosen_and_meets_the_target(finished, parent):
    solutions = json.loads((finished / "solve/solutions.json").read_text())
    measured = [entry["validation"]["kl"] for entry in solutions["pool"]]
    assert solutions["chosen"] == int(np.argmin(measured))
    assert solutions["pool"][solutions["chosen"]]["above_best"]["mean"] == 0.0
    # A baseline joins the pool where it meets the target and is not among the solutions already.
    sets = [
        [layer["kept"] for layer in entry["layers"]] + [layer["sliding_window"] for layer in entry["layers"]]
        for entry in solutions["pool"]
    ]
    assert all(not entry["missed"] for entry in solutions["pool"]) and all(sets.count(one) == 1 for one in sets)
    for baseline in solutions["baselines"]:
        if baseline["name"] in ("greedy", "experts_only", "windows_only") and not baseline["missed"]:
            layers = baseline["layers"]
            assert [layer["kept"] for layer in layers] + [layer["sliding_window"] for layer in layers] in sets
    assert {entry["name"] for entry in solutions["baselines"]} > {"greedy", "random", "max_params"}
    refined = json.loads((finished / "refine/refined.json").read_text())
    accepted = [step["candidate"] for step in refined["tried"] if step["accepted"]]
    chosen = (accepted or [solutions["pool"][solutions["chosen"]]])[-1]
    child = load_checkpoint(finished / "child")
    layers = [(b.num_experts, b.window) for b in child.config.blocks]
    assert layers == [(x["num_local_experts"], x["sliding_window"]) for x in chosen["layers"]]
    evaluation = json.loads((finished / "evaluate/evaluation.json").read_text())
    assert evaluation["child"]["expert_bytes"] <= 0.8 * evaluation["parent"]["expert_bytes"]
    # Scales of the FP8 cache, two of four bytes per layer, do not belong to the architecture; plain children have none.
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
    assert capsys.readouterr().out.count("unchanged, skipped") == len(STAGE_NAMES)


def test_open_batches_several_scenarios_and_a_yarn_factor(finished, parent, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*-book.safetensors"))
    options = (
        *("--scenario.batch", "null", "--scenario.max_batch", "6", "--child.yarn_factor", "48"),
        *("--more_scenarios", '[{"name": "long", "input_tokens": 60, "output_tokens": 20, "hardware": "h100"}]'),
        *("--target.min_speedup", "{chat: 1.0, long: 1.0}", "--evaluate.rounds", "0", "--refine.swaps", "0"),
    )
    assert search(parent, run, *options) == 0
    found = json.loads((run / "evaluate/evaluation.json").read_text())
    chat, long = (found["child"]["scenarios"][name] for name in ("chat", "long"))
    assert 1 <= chat["batch"] <= 6 < long["batch"] <= 256
    for name in ("chat", "long"):
        child, of_parent = (found[model]["scenarios"][name] for model in ("child", "parent"))
        assert child["predicted_tokens_per_second"] >= of_parent["predicted_tokens_per_second"] * (1 - 1e-9)
        assert child["throughput"] is None
    child = load_checkpoint(run / "child").config
    assert (child.rope.factor, load_checkpoint(parent).config.rope.factor) == (48.0, 4.0)
    # The parent is evaluated unchanged; even a child with all experts would differ by its RoPE factor.
    assert found["parent"]["heldout"]["kl"] < 1e-6 < found["child"]["heldout"]["kl"]
    assert "requests together, long" in (run / "report/report.md").read_text()


def test_a_search_with_floors(finished, parent, tmp_path):
    """Every expert set costs KL at high effort, and some cost more of it than others."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    floors = ("--target.max_kl.times_mean", "high=0.95", "--target.max_kl.share_of_entropy", "{chain/low: 50}")
    assert search(parent, run, *TIMELESS, *floors, "--refine.swaps", "2", "--refine.swaps_by", "gradients") == 0
    scores = json.loads((run / "score/scores.json").read_text())
    assert list(scores["entropy"]) == ["chain/low"] and 0 < scores["entropy"]["chain/low"] < np.log(512)
    some = [choice["score"] for layer in scores["layers"] for choice in layer["experts"] if choice["score"] is not None]
    assert some and all(list(score["groups"]) == ["high", "chain/low"] for score in some)
    solutions = json.loads((run / "solve/solutions.json").read_text())
    validation = read_traces(run / "traces/validation.parquet")
    assert {trace.effort for trace in validation} == {"low", "medium", "high"}
    held = []
    for entry in solutions["pool"]:
        kls = entry["measured_kl"]
        assert kls["*"] == pytest.approx(entry["validation"]["kl"])
        held.append(kls["high"] <= 0.95 * kls["*"])
        assert bool(entry["missed"]) is not held[-1] and all("KL of high on" in words for words in entry["missed"])
    chosen = solutions["pool"][solutions["chosen"]]
    if any(held):
        expected = [entry["expected"] for entry, keeps in zip(solutions["pool"], held, strict=True) if keeps]
        assert not chosen["missed"] and chosen["expected"] == min(expected)
    refined = json.loads((run / "refine/refined.json").read_text())
    evaluation = json.loads((run / "evaluate/evaluation.json").read_text())
    assert evaluation["child"]["missed"] == refined["child"]["missed"]
    assert any(held) <= (not refined["child"]["missed"])


def test_the_evaluation_is_told_by_task_and_effort(finished):
    evaluation = json.loads((finished / "evaluate/evaluation.json").read_text())
    heldout = read_traces(finished / "traces/heldout.parquet")
    for entry in evaluation.values():
        by_effort = entry["heldout_kl"]["efforts"]
        tokens = {effort: sum(len(t.completion) for t in heldout if t.effort == effort) for effort in by_effort}
        mean = sum(by_effort[effort]["kl"] * count for effort, count in tokens.items()) / sum(tokens.values())
        assert mean == pytest.approx(entry["heldout"]["kl"], abs=1e-9)
        assert entry["heldout_kl"]["tasks"]["chain"]["kl"] == pytest.approx(entry["heldout"]["kl"])
        efforts = entry["efforts"].values()
        assert entry["tasks"]["chain"]["answers"] == sum(summary["answers"] for summary in efforts)
    text = (finished / "report/report.md").read_text()
    assert "## By task and effort" in text and "held-out KL, chain" in text and "accuracy, medium" in text


def test_loads_of_experts_enter_the_roofline(finished):
    loads = json.loads((finished / "rank/routing.json").read_text())
    assert len(loads) == 8 and loads == sorted(loads, reverse=True) and min(loads) > 0
    even, uneven = (read_costs(finished / stage / "costs.json") for stage in ("cost", "refine_costs"))
    roofline = Roofline(profile=tuple(loads))
    config, scenario = load_checkpoint(finished / "child").config, even.scenarios[0]
    seconds = roofline.times(config, scenario, "mxfp4", [6], []).experts[6]
    assert uneven.layers[0].experts[6].seconds["chat"] == seconds != even.layers[0].experts[6].seconds["chat"]
    assert uneven.layers[1].attention == even.layers[1].attention


SCORED = ("rank", "refine_costs", "score", "solve", "refine")


@SLOW
def test_eight_devices_choose_what_one_does(finished, parent, tmp_path):
    """Runs in its own process, and not by default: with fewer cores than devices, XLA programs have deadlocked."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns(*SCORED, "*-book.safetensors"))
    options = ["--parent", str(parent), "--run", str(run), *SETTINGS, "--mesh.data", "2", "--mesh.model", "4"]
    program = "import sys; from puzzle_jax.search.__main__ import main; sys.exit(max(map(main, {})))"
    calls = [[stage, *options] for stage in SCORED]
    ended = subprocess.run(
        [sys.executable, "-c", program.format(calls)],
        env={**os.environ, "XLA_FLAGS": f"{EIGHT_DEVICES} {QUICK}"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert ended.returncode == 0, ended.stderr
    one, eight = (json.loads((r / "score/scores.json").read_text())["layers"] for r in (finished, run))
    for of_one, of_eight in zip(one, eight, strict=True):
        assert [c["kept"] for c in of_one["experts"]] == [c["kept"] for c in of_eight["experts"]]
        scores = [[c["score"] for c in layer["experts"]] + layer["window_scores"] for layer in (of_one, of_eight)]
        kls = [[0.0 if score is None else score["kl"] for score in of_layer] for of_layer in scores]
        np.testing.assert_allclose(kls[0], kls[1], rtol=1e-3, atol=1e-7)
    one, eight = (json.loads((r / "refine/refined.json").read_text())["child"]["layers"] for r in (finished, run))
    assert one == eight


KILLED = ("traces", "refine", "child", "evaluate", "report")
MOMENTS = [(stage, share) for stage in KILLED for share in (0.0, 0.4, 0.8)]


@pytest.mark.parametrize(
    ("stage", "share"),
    [
        moment if moment in (("traces", 0.4), ("refine", 0.8), ("evaluate", 0.4)) else pytest.param(*moment, marks=SLOW)
        for moment in MOMENTS
    ],
)
def test_a_search_that_is_killed_ends_with_the_same_files(timeless, parent, tmp_path, stage, share):
    """The process is killed when the given share of the stage's usual seconds has passed since the stage began."""
    run = tmp_path / "run"
    directories = ("cost", "traces", "rank", "refine_costs", "score", "solve", "refine", "child", "evaluate", "report")
    ahead = directories[directories.index(stage) :]
    shutil.copytree(timeless, run, ignore=shutil.ignore_patterns(*ahead, "*-book.safetensors"))
    seconds = json.loads((timeless / stage / "stage.json").read_text())["seconds"]
    search_of = ["tests.processes.program", "puzzle_jax.search"]
    command = [sys.executable, "-m", *search_of, "--parent", str(parent), "--run", str(run)]
    process = subprocess.Popen([*command, *SETTINGS, *TIMELESS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(run.glob(f".{stage}.partial-*")):
        time.sleep(0.002)
    time.sleep(share * seconds)
    process.kill()
    process.wait()
    assert not (run / "report/report.md").exists() or stage == "report"
    assert search(parent, run, *TIMELESS) == 0
    for path in timeless.rglob("*"):
        name = path.relative_to(timeless)
        # stage.json and the pages that show it hold the seconds that stages took; tables only keep scores.
        passed = (
            "stage.json",
            "hours.json",
            "report.html",
            "run.json",
            "score-book.safetensors",
            "refine-book.safetensors",
        )
        if path.is_file() and name.name not in passed and not name.name.endswith("-book.safetensors"):
            assert (run / name).read_bytes() == path.read_bytes(), name
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("stage", "directory"), [("trace", "traces"), ("evaluate", "evaluate")])
def test_an_interrupted_stage_asks_no_answered_question_again(
    timeless, parent, tmp_path, monkeypatch, stage, directory
):
    run, asked = tmp_path / "run", []
    shutil.copytree(timeless, run, ignore=shutil.ignore_patterns(directory))

    def counting(*args, on_answer, dies_after, **options):
        def counted(number, answer):
            on_answer(number, answer)
            asked.append(number)
            if len(asked) == dies_after:
                raise KeyboardInterrupt

        return answer_questions(*args, on_answer=counted, **options)

    for dies_after, code in ((5, 130), (None, 0)):
        for module in ("traces", "evaluator"):
            asking = partial(counting, dies_after=dies_after)
            monkeypatch.setattr(f"puzzle_jax.search.{module}.answer_questions", asking)
        assert search(parent, run, stage, *TIMELESS) == code
    # 9 problems (4 sets of 3, 2, 2 and 2) at 3 efforts; 2 problems at 3 efforts for each distinct model.
    models = json.loads((timeless / "evaluate/evaluation.json").read_text()).values()
    different = {json.dumps([(x["kept"], x["sliding_window"]) for x in model["layers"]]) for model in models}
    assert len(models) == 5 and len(asked) == {"trace": 9 * 3, "evaluate": len(different) * 2 * 3}[stage]
    for path in (timeless / directory).iterdir():
        if path.name != "stage.json":
            assert (run / directory / path.name).read_bytes() == path.read_bytes()


FINALISTS = ("--finalists", "count=2,steps=3,problems=1,rows=2")


def test_finalists_are_trained_once_each_and_one_is_refined(timeless, parent, tmp_path, monkeypatch, capsys):
    run, trained = tmp_path / "run", []
    shutil.copytree(timeless, run, ignore=shutil.ignore_patterns("evaluate", "report"))
    assert search(parent, run, "trace", *TIMELESS, *FINALISTS) == 0
    traces = sorted(path.stem for path in (run / "traces").glob("*.parquet"))
    assert traces == ["calibration", "confirmation", "heldout", "training", "validation"]
    for path in (timeless / "traces").glob("*.parquet"):
        assert (run / "traces" / path.name).read_bytes() == path.read_bytes()
    train = ShortDistillation.__call__

    def dying(self, child):
        trained.append(child.kept)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(self, child)

    monkeypatch.setattr(ShortDistillation, "__call__", dying)
    for code in (130, 0):
        assert search(parent, run, "--stage", "finalists", *TIMELESS, *FINALISTS) == code
    assert len(trained) == 3 and trained[1] == trained[2] != trained[0]
    found = json.loads((run / "finalists/finalists.json").read_text())
    after = [entry["after"]["kl"] for entry in found["finalists"]]
    assert len(after) == 2 and found["chosen"] == after.index(min(after)) and found["steps"] == 3
    solutions = json.loads((timeless / "solve/solutions.json").read_text())
    best = solutions["pool"][solutions["chosen"]]
    assert found["finalists"][0]["layers"] == best["layers"]
    assert found["finalists"][0]["before"]["kl"] == pytest.approx(best["validation"]["kl"], rel=1e-5)
    capsys.readouterr()
    assert search(parent, run, "refine", *TIMELESS, *FINALISTS) == 0
    assert "finalists/finalists.json" in json.loads((run / "refine/stage.json").read_text())["inputs"]
    assert "finalists/finalists.json" not in json.loads((timeless / "refine/stage.json").read_text())["inputs"]
    assert search(parent, run, "--stage", "finalists", *TIMELESS) == 2  # nothing of the kind where it is off
    assert "stage is 'finalists', but must be one of all, cost, trace, rank," in capsys.readouterr().err


def test_windows_without_evidence_or_use_are_left_out_and_told(finished, parent, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*-book.safetensors"))
    longest = max(len(t.prompt) + len(t.completion) for t in read_traces(run / "traces/calibration.parquet"))
    options = ("--space.windows", f"[700, 600, {longest - 1}, {longest - 2}]", "--scenario.input_tokens", "600")
    with pytest.warns(
        PuzzleWarning, match=r"space\.windows: 700 left out, since scenario 'chat' never has more than 608"
    ):
        assert search(parent, run, "cost", *options) == 0
    with pytest.warns(
        PuzzleWarning, match=rf"windows: 600, {longest - 1} left out, since the longest .* only {longest} "
    ):
        assert search(parent, run, "trace", *options) == 0
    for stage in ("refine_costs", "score"):
        assert search(parent, run, stage, *options) == 0
    layers = json.loads((run / "score/scores.json").read_text())["layers"]
    assert [layer["windows"] for layer in layers] == [[16], [None, longest - 2]]
    assert layers[1]["window_scores"][1]["kl"] > 0  # one trace is longer, and it was scored


def test_methods_of_scoring_agree_on_what_matters(finished, parent, tmp_path):
    """Adaptive scores equal exact ones where adaptive scoring used all traces, and name no other alternatives."""
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*-book.safetensors"))
    found = {}
    for method in ("exact", "lens"):
        assert search(parent, run, "score", "--score.method", method, "--score.keep_sets", "0") == 0
        found[method] = json.loads((run / "score/scores.json").read_text())
    exact, adaptive = (
        {
            (layer, tuple(choice["kept"])): choice["score"]
            for layer, entry in enumerate(scores["layers"])
            for choice in entry["experts"]
            if choice["score"]
        }
        for scores in (found["exact"], json.loads((finished / "score/scores.json").read_text()))
    )
    assert set(adaptive) <= set(exact) and found["exact"]["pairs"] == found["exact"]["all_pairs"]
    for key, score in adaptive.items():
        if score["traces"] == exact[key]["traces"]:
            assert score["kl"] == pytest.approx(exact[key]["kl"], rel=1e-4)


def test_restrictions_and_refinement_from_the_shell(finished, parent, tmp_path):
    run = tmp_path / "run"
    rules = '[{"layers": "0", "min_experts": 8}, {"layers": "1", "windows": ["full"]}]'
    options = ("--space.restrict", rules, "--refine.rounds", "2", "--refine.proposals", "2")
    options = (*options, "--refine.swaps_by", "gradients")
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("*-book.safetensors"))
    for stage in ("cost", "refine_costs", "score", "solve", "refine"):
        assert search(parent, run, stage, *options) == 0
    layers = json.loads((run / "refine/refined.json").read_text())["child"]["layers"]
    assert (layers[0]["num_local_experts"], layers[1]["sliding_window"]) == (8, None)
    tried = json.loads((run / "refine/refined.json").read_text())["tried"]
    assert tried[-1]["step"].startswith("swap ") and tried[0]["step"] == "rescore 1"
    accepted = [step for step in tried if step["accepted"]]
    if accepted:  # a swap changes which experts are kept, not how many
        assert accepted[-1]["candidate"]["layers"] == layers


def test_traces_from_elsewhere_take_the_place_of_asking(finished, parent, tmp_path, capsys):
    run, file = tmp_path / "run", tmp_path / "traces.jsonl"
    sets = ("calibration", "validation", "confirmation", "heldout")
    traces = [t for name in sets for t in read_traces(finished / f"traces/{name}.parquet")]
    write_traces(file, traces)
    assert search(parent, run, "--traces.file", str(file), "--evaluate.rounds", "0") == 0
    found = [t for name in sets for t in read_traces(run / f"traces/{name}.parquet")]
    assert sorted(t.prompt for t in found) == sorted(t.prompt for t in traces)
    assert (run / "report/report.md").is_file()
    # Limits on the KL of groups are for what the file holds, which is read before any work.
    unknown = ("--traces.file", str(file), "--target.max_kl.nats", "poetry=1")
    assert search(parent, tmp_path / "other", *unknown) == 2 and not (tmp_path / "other").exists()
    assert "target.max_kl.nats names 'poetry', but must name" in capsys.readouterr().err


def test_one_stage_runs_alone_and_a_changed_setting_reruns_what_follows(finished, parent, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert search(parent, run, "solve", "--solve.solutions", "1") == 0
    assert "skipped" not in capsys.readouterr().out
    names = [entry["name"] for entry in json.loads((run / "solve/solutions.json").read_text())["pool"]]
    assert names[0] == "solution 1" and set(names[1:]) <= {"greedy", "experts_only", "windows_only"}


def test_an_infeasible_target_names_the_limit_and_keeps_what_was_solved(finished, parent, tmp_path, capsys):
    """An infeasible program must not write an empty result on which a later stage fails for another reason."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert search(parent, run, "solve", "--target.min_speedup", "50") == 2
    said = capsys.readouterr().err
    assert "speed-up" in said and "the best reachable" in said and said.count("\n") == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("stage", "file", "change"),
    [
        ("solve", "score/scores.json", lambda v: v["layers"][0].pop("experts")),
        ("refine", "solve/solutions.json", lambda v: v.pop("chosen")),
        ("report", "evaluate/evaluation.json", lambda v: v["child"].pop("scenarios")),
    ],
)
def test_an_edited_file_that_cannot_be_used_is_named(timeless, parent, tmp_path, capsys, stage, file, change):
    run = tmp_path / "run"
    shutil.copytree(timeless, run)
    value = json.loads((run / file).read_text())
    change(value)
    (run / file).write_text(json.dumps(value))
    assert search(parent, run, stage, *TIMELESS) == 2
    said = capsys.readouterr().err
    assert f"stage {stage!r} cannot use {run / file}, which was changed" in said and said.count("\n") == 1


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
        (("--more_scenarios", '[{"name": "chat", "input_tokens": 7, "output_tokens": 8}]'), "named chat, chat"),
        (("--target.min_speedup", "{long: 1.2}"), "target.min_speedup.long is 1.2, but the scenarios are chat"),
        (("--child.yarn_factor", "0.5"), "child.yarn_factor is 0.5, but must be at least 1"),
        (("--space.divisor", "0"), "divisor is 0"),
        (("--space.restrict", '[{"layers": "0-7"}]'), "space.restrict has layers '0-7', but must list"),
        (("--space.restrict", '[{"layers": "1", "max_experts": 3}]'), "leaves layer 1 no expert count of 0 to 3"),
        (("--space.restrict", '[{"layers": "0", "windows": [7]}]'), "but must allow the parent's own (16)"),
        (("--refine.rounds", "3"), "refine.rounds is 3, but must be from 0 to 2"),
        (("--score.first", "0"), "score.first is 0"),
        (("--mesh.model", "99"), "needs 99 devices"),
        (
            ("--costs", "guessed"),
            "costs is 'guessed', but must be measured, xla, roofline, or the path of a .json file",
        ),
        (("--costs", "xla"), "xla costs"),  # needs a compiler that is not installed, or a cache of two-byte values
        (("--costs", "nowhere.json"), "costs is nowhere.json, but there is no such file"),
        (("--no-such-setting=1",), "no-such-setting"),
        (
            ("--recipe", "nowhere.yaml"),
            "recipe is 'nowhere.yaml', but there is no such file, and",
        ),
    ],
)
def test_bad_settings_are_one_sentence_and_harm_nothing(parent, tmp_path, capsys, arguments, message):
    assert search(parent, tmp_path / "run", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "traces").exists()


def test_costs_from_elsewhere_are_used_as_they_are(finished, parent, tmp_path, capsys):
    timed = tmp_path / "timed.json"
    costs = json.loads((finished / "cost/costs.json").read_text())
    timed.write_text(json.dumps({**costs, "provider": "a stopwatch"}))
    assert search(parent, tmp_path / "run", "cost", "--costs", str(timed)) == 0
    assert json.loads((tmp_path / "run/cost/costs.json").read_text()) == json.loads(timed.read_text())
    del costs["layers"][1]["experts"]["6"]
    timed.write_text(json.dumps(costs))
    assert search(parent, tmp_path / "run", "cost", "--costs", str(timed)) == 2
    assert f"{timed}: the costs lack layer 1: expert counts 6" in capsys.readouterr().err


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
    save_parent(other, seed=1)
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
