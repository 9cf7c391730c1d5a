"""benchmarks/gpu_day.py: no step stops the others, each one's findings are on disk, and real steps run dry on a CPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import Step
from tests.paths import ROOT

HANG = """
import subprocess, sys, time
print("before it hangs", flush=True)
program = "import pathlib, time; pathlib.Path({ready!r}).touch(); time.sleep(3600)"
subprocess.Popen([sys.executable, "-c", program], close_fds=False)
time.sleep(3600)
"""
MINUTES = 1.0


@pytest.fixture
def children(monkeypatch, tmp_path):
    """A table of four steps and their programs, and a clock that stands still until the hanging one is ready."""
    ready, out = tmp_path / "ready", tmp_path / "out"
    programs = {
        "broken": "import sys; print('first line'); sys.exit('no such thing')",
        "hangs": HANG.format(ready=str(ready)),
        "works": f"import pathlib; pathlib.Path({str(out / 'works.txt')!r}).write_text('12.5')",
        "long": "raise AssertionError('it is never started')",
    }

    def figures(out):
        return {"score": float((out / "works.txt").read_text()), "rows": [{"a": 1, "b": "x|y"}, {"a": 2}]}

    steps = {
        "broken": Step(1, _never, lambda out: {}),
        "hangs": Step(1, _never, lambda out: {"before": "some"}),
        "works": Step(1, _never, figures),
        "long": Step(1, _never, lambda out: {}, least=41),
    }
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    monkeypatch.setattr(gpu_day, "command", lambda name, options: [sys.executable, "-c", programs[name]])
    monkeypatch.setattr(gpu_day, "now", lambda: 20.0 if ready.exists() else 0.0)
    return out


def _never(out, dry):
    raise AssertionError("steps run in processes of their own")


def outcomes(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_no_step_stops_the_others(children, capfd):
    # All processes of a step hold the write end of this pipe, so reading finds its end once none of them is left.
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    popen = gpu_day.subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_day.subprocess, "Popen", lambda *args, **options: popen(*args, close_fds=False, **options))
        assert gpu_day.main(["--out", str(children), "--minutes", str(MINUTES)]) == 0
    os.close(writing)
    assert os.read(reading, 1) == b""
    os.close(reading)

    broken, hangs, works, long = outcomes(children)
    assert (broken["step"], broken["status"], broken["seconds"]) == ("broken", "failed", 0.0)
    assert broken["error"] == "first line\nno such thing"
    # A step's limit is its share of the time left: of 60 s, of 60 s, then of the 40 s that the hanging one leaves.
    assert [each["limit_seconds"] for each in (broken, hangs, works, long)] == [15.0, 20.0, 20.0, 40.0]
    assert (hangs["status"], hangs["seconds"], hangs["error"]) == ("timed out", 20.0, "before it hangs")
    assert hangs["result"] == {"before": "some"}
    assert (works["status"], works["error"]) == ("ok", "")
    assert works["result"] == {"score": 12.5, "rows": [{"a": 1, "b": "x|y"}, {"a": 2}]}
    assert (long["status"], long["error"], long["result"]) == ("skipped", "40 s are left, and it needs 41", {})
    assert (children / "hangs.log").read_text() == "before it hangs\n" and not (children / "long.log").exists()

    report = (children / "report.md").read_text()
    assert "| broken | failed | 0 | 15 |\n| hangs | timed out | 20 | 20 |\n| works | ok | 0 | 20 |" in report
    assert "| long | skipped | 0 | 40 |\n\n## broken: failed\n\n```\nfirst line\nno such thing\n```\n" in report
    assert "## works: ok\n\nscore: 12.5\n\nrows:\n\n| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| 2 |  |\n" in report
    assert "timed out, 20.0 of 20 s" in capfd.readouterr().out


def test_results_are_there_before_the_next_step(children, monkeypatch):
    seen = []
    run_step = gpu_day.run_step

    def watched(name, options, limit):
        lines = outcomes(children) if seen else []
        report = (children / "report.md").read_text() if seen else ""
        assert [line["step"] for line in lines] == seen and all(f"## {step}: " in report for step in seen)
        seen.append(name)
        return run_step(name, options, limit)

    monkeypatch.setattr(gpu_day, "run_step", watched)
    assert gpu_day.main(["--out", str(children), "--only", "works,broken"]) == 0
    assert seen == ["broken", "works"]


def test_a_step_that_cannot_start_or_whose_files_say_nothing_is_an_outcome(children, monkeypatch):
    monkeypatch.setattr(gpu_day, "command", lambda name, options: ["/nowhere/python"])
    assert gpu_day.main(["--out", str(children), "--only", "broken"]) == 0
    (found,) = outcomes(children)
    assert found["status"] == "failed" and "/nowhere/python" in found["error"]
    monkeypatch.setattr(gpu_day, "command", lambda name, options: [sys.executable, "-c", ""])
    assert gpu_day.main(["--out", str(children / "more"), "--only", "works"]) == 0
    (found,) = outcomes(children / "more")
    assert found["status"] == "ok" and found["result"]["unreadable"].startswith("FileNotFoundError: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "doctor,kernel"], "--only names 'kernel', but the steps are doctor, kernels, search_tiny, "),
        (["--minutes", "0"], "--minutes is 0.0, but must be a number above 0"),
        (["--minutes", "nan"], "--minutes is nan, but must be a number above 0"),
        (["--minutes", "long"], "argument --minutes: invalid float value: 'long'"),
        (["--step", "nothing"], "argument --step: invalid choice: 'nothing'"),
        (["--wet"], "unrecognized arguments: --wet"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(arguments, sentence, tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu_day.main(["--out", str(out), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gpu_day.py: {sentence}") and said.count("\n") == 1
    assert not out.exists()


def test_starting_steps_takes_no_jax():
    loaded = "import sys, benchmarks.gpu_day; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


def test_results_of_an_earlier_run_are_kept(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert gpu_day.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"gpu_day.py: {tmp_path} holds the results of an earlier run; name another directory with --out\n"
    )
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"


# Steps ----------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_serves_here(tmp_path):
    assert gpu_day.main(["--out", str(tmp_path), "--dry", "--only", "doctor,search_tiny"]) == 0
    doctor, search = outcomes(tmp_path)
    assert (doctor["step"], doctor["status"], doctor["error"]) == ("doctor", "ok", "")
    assert doctor["result"]["devices"][0] == "device 0: cpu, cpu" and doctor["result"]["verdicts"] == []
    served = {each["operation"]: each["served by"] for each in doctor["result"]["operations"]}
    assert len(served) == 18 and "experts, MXFP4, 64 tokens" in served
    assert served["attention, 4,096 tokens, all keys"] == "causal_blocks"
    assert served["attention, 4,096 tokens, window 128"] == "banded"
    assert served["decoding, cache of 128 slots, e4m3"] == "reference"
    assert {each["refusal"] for each in doctor["result"]["operations"]} == {"for a GPU, but this is a CPU"}
    assert (search["status"], search["result"]) == ("ok", {"dry": "parsed only"})
    assert "max_expert_bytes_ratio: 0.65" in (tmp_path / "search_tiny.log").read_text()
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# A day with a GPU (dry run on a CPU)\n\n- device 0: cpu, cpu\n")
    assert "| attention, 4,096 tokens, window 128 | banded | for a GPU, but this is a CPU |" in report


def test_what_trials_had_found_is_told_of_a_doctor_that_was_killed(tmp_path):
    tried = {
        "a": {"error": 0.01, "xla_error": 0.02, "seconds": {"forwards": 3.0}, "xla_seconds": {"forwards": 4.0}},
        "b": {"reason": "it does not run here: no"},
        "c": {"trying": "host 7"},
    }
    (tmp_path / gpu_day.VERDICTS).write_text(json.dumps({"H200 | jax": tried}))
    (tmp_path / "doctor.json").touch()
    assert gpu_day.doctor_figures(tmp_path) == {
        "devices": [],
        "operations": [],
        "verdicts": [
            {"kernel": "a", "left out": None, "error": 0.01, "error of XLA": 0.02, "time forwards / XLA's": 0.75},
            {"kernel": "b", "left out": "it does not run here: no", "error": None, "error of XLA": None},
            {"kernel": "c", "left out": "a trial that did not end", "error": None, "error of XLA": None},
        ],
    }


def test_kernels_are_told_by_their_median_and_their_share_of_the_floor(tmp_path):
    fast = {
        "case": "x",
        "implementation": "mosaic_gpu",
        "seconds": [0.003, 0.002, 0.009],
        "error": 0.1,
        "floor": 0.0015,
    }
    rows = [fast, {"case": "x", "implementation": "tokamax", "missing": "no module"}]
    (tmp_path / "kernels.json").write_text(json.dumps({"device": "H200", "rows": rows}))
    found = gpu_day.kernel_figures(tmp_path)
    first, second = found["kernels"]
    assert found["device"] == "H200" and first["milliseconds"] == 3.0 and first["share of floor"] == pytest.approx(0.5)
    assert second == {"case": "x", "implementation": "tokamax", "missing": "no module"}


def test_tiles_are_read_from_what_was_printed(tmp_path):
    lines = [
        "H200, gpu, jax 1",
        "m.packed, up to 8",
        "  {'groups': 2}: 0.300 ms",
        "  as reckoned: 0.450 ms",
        "m.dense, up to 64",
    ]
    (tmp_path / "tiles.log").write_text("\n".join(lines) + "\n")
    assert gpu_day.tile_figures(tmp_path) == {
        "table": None,
        "sizes": [
            {"size": "m.packed, up to 8", "fastest": "{'groups': 2}", "milliseconds": 0.3, "as reckoned": 0.45},
            {"size": "m.dense, up to 64"},
        ],
    }


def test_a_search_is_told_as_far_as_it_came(tmp_path):
    run = tmp_path / "search_tiny"
    for directory, name, seconds in (("traces", "trace", 2.5), ("cost", "cost", 1.5)):
        (run / directory).mkdir(parents=True)
        (run / directory / "stage.json").write_text(json.dumps({"name": name, "seconds": seconds}))
    stages = [{"stage": "cost", "seconds": 1.5}, {"stage": "trace", "seconds": 2.5}]
    assert gpu_day.search_figures("search_tiny", tmp_path) == {"stages": stages}
    (run / "refine").mkdir()
    layers = [{"num_local_experts": 14, "sliding_window": 64}, {"num_local_experts": 6, "sliding_window": None}]
    (run / "refine" / "refined.json").write_text(json.dumps({"child": {"layers": layers}}))
    assert gpu_day.search_figures("search_tiny", tmp_path)["child"] == [
        {"layer": 0, "experts": 14, "window": 64},
        {"layer": 1, "experts": 6, "window": "full"},
    ]


def test_training_is_told_without_the_steps_that_compile_and_evaluate(tmp_path):
    (tmp_path / "grpo_step").mkdir()
    lines = [
        {"step": n, "seconds_per_step": s, "reward": 0.5, "kl": 0.0} for n, s in enumerate((9.0, 1.0, 2.0, 5.0), 1)
    ]
    (tmp_path / "grpo_step" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = gpu_day.training_figures("grpo_step", tmp_path)
    assert found["median seconds of a step"] == 1.5
    assert found["steps"][0] == {"step": 1, "seconds_per_step": 9.0, "reward": 0.5}


def test_a_verb_that_a_signal_ended_is_run_again_and_one_that_fails_is_not(tmp_path, capfd):
    path = tmp_path / "runs"
    program = f"import os, pathlib; p = pathlib.Path({str(path)!r}); n = len(p.read_text()) if p.exists() else 0; "
    program += "p.write_text('x' * (n + 1)); os.abort() if n < 2 else print('done')"
    gpu_day.call("-c", program, attempts=3)
    assert path.read_text() == "xxx" and capfd.readouterr().out.count("ended by signal 6; once more") == 2
    with pytest.raises(SystemExit) as end:
        gpu_day.call("-c", "import sys; print('once'); sys.exit(2)", attempts=3)
    assert end.value.code == 2 and capfd.readouterr().out.splitlines().count("once") == 1
