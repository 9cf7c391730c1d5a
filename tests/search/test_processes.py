"""Searches in several processes, as on several hosts: they find what one process finds, refuse bad input together, end
when one of them is lost, and are resumed by another number of processes."""

import json
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from puzzle_jax.errors import PuzzleWarning
from puzzle_jax.evaluate.accuracy import answer_questions
from puzzle_jax.generate.traces import read_traces
from puzzle_jax.search.__main__ import main
from puzzle_jax.search.artifacts import SCORE_TABLE
from puzzle_jax.search.parent import warn_of_undivided
from puzzle_jax.search.pipeline import STAGE_NAMES
from tests.compiler_flags import QUICK
from tests.processes.start import ended, running
from tests.search.toy_search import SETTINGS, TIMELESS, save_parent
from tests.support import chat_config

PROGRAM = "puzzle search"
SLOW = pytest.mark.slow
OWN_DEVICES = 2
# What Gloo's threads write to the standard output as they connect, a few words at a time, so that their lines may mix.
GLOO = re.compile(
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : |\n"
)


@pytest.fixture(scope="module")
def parents(parent, tmp_path_factory) -> list[Path]:
    """Two parents whose files have the same sizes."""
    other = tmp_path_factory.mktemp("parents") / "other"
    save_parent(other, seed=1)
    sizes = [{file.name: file.stat().st_size for file in of.iterdir()} for of in (parent, other)]
    assert sizes[0] == sizes[1]
    return [parent, other]


@pytest.fixture(scope="module")
def alone(timeless) -> Path:
    """The run of one process on one device."""
    return timeless


def arguments(parent: Path, run: Path, *more: str, stage: str = "all") -> list[str]:
    return [stage, "--parent", str(parent), "--run", str(run), *SETTINGS, *TIMELESS, *more]


def command(parent: Path, run: Path, *more: str, mesh: str = "data=2", stage: str = "cost") -> list[str]:
    return ["puzzle_jax.search", *arguments(parent, run, "--mesh", f"processes=2,{mesh}", *more, stage=stage)]


def in_processes(count: int, parent: Path, run: Path, mesh: str, scratch: Path):
    """A whole search in `count` processes of two devices each; only the first one has the run's directory."""
    more = ("--mesh", f"processes={count},{mesh}")
    runs = [run, *[run.parent / "nowhere"] * (count - 1)]
    flags = f"--xla_force_host_platform_device_count={OWN_DEVICES} {QUICK}"
    commands = [["puzzle_jax.search", *arguments(parent, each, *more)] for each in runs]
    return running(*commands, XLA_FLAGS=flags, TMPDIR=str(scratch))


# What they find ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, "model=4"),  # shards experts across processes
        pytest.param(2, "data=2,model=2", marks=SLOW),
        pytest.param(2, "data=4", marks=SLOW),
        pytest.param(4, "data=2,model=4", marks=SLOW),
    ],
)
def test_processes_find_the_child_that_one_device_finds(alone, parents, tmp_path, count, mesh):
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    scratch.mkdir()
    with in_processes(count, parents[0], run, mesh, scratch) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [0] * count, [process.stderr for process in found]
    assert re.findall(r"([a-z_]+) +[\d.]+ s\n", found[0].stdout) == list(STAGE_NAMES), found[0].stdout
    assert [GLOO.sub("", process.stdout) for process in found[1:]] == [""] * (count - 1)
    assert not (tmp_path / "nowhere").exists() and not list(scratch.glob("puzzle_jax-run-*"))
    for name in ("calibration", "validation", "confirmation", "heldout"):
        one, several = (read_traces(r / f"traces/{name}.parquet") for r in (alone, run))
        assert list(one) == list(several)
    for name in ("removal_error", "joint_greedy", "reap", "easy_ep", "ranked_choice"):
        one, several = (load_file(r / "rank/ranking.safetensors")[name] for r in (alone, run))
        np.testing.assert_allclose(several, one, rtol=2e-3)
    one, several = (scores(r) for r in (alone, run))
    assert [layer[0] for layer in one] == [layer[0] for layer in several]
    for of_one, of_several in zip(one, several, strict=True):
        np.testing.assert_allclose(of_several[1], of_one[1], rtol=1e-3, atol=1e-7)
    one, several = (json.loads((r / "refine/refined.json").read_text())["child"]["layers"] for r in (alone, run))
    assert one == several
    assert (run / "child/model.safetensors").read_bytes() == (alone / "child/model.safetensors").read_bytes()
    one, several = (json.loads((r / "evaluate/evaluation.json").read_text()) for r in (alone, run))
    for name, of_one in one.items():
        assert several[name]["efforts"] == of_one["efforts"]
        assert several[name]["heldout"]["kl"] == pytest.approx(of_one["heldout"]["kl"], rel=1e-3, abs=1e-7)


def scores(run: Path) -> list[tuple[list[list[int]], list[float]]]:
    """Expert sets of each layer, and the KL of all its alternatives."""
    layers = json.loads((run / "score/scores.json").read_text())["layers"]
    return [
        (
            [choice["kept"] for choice in layer["experts"]],
            [
                0.0 if score is None else score["kl"]
                for score in [*[choice["score"] for choice in layer["experts"]], *layer["window_scores"]]
            ],
        )
        for layer in layers
    ]


# How they end --------------------------------------------------------------------------------------------------------

LOST = [(stage, lost) for stage in ("trace", "score") for lost in range(2)]
MOMENTS = {"trace": ".traces.kept-*/calibration.jsonl", "score": SCORE_TABLE}
DIRECTORIES = ("traces", "rank", "refine_costs", "score", "solve", "refine", "child", "evaluate", "report")


@pytest.mark.once
@pytest.mark.parametrize(
    ("stage", "lost"),
    [each if each in (("trace", 0), ("score", 1)) else pytest.param(*each, marks=SLOW) for each in LOST],
)
def test_a_search_that_loses_a_process_ends_in_a_sentence_and_one_process_goes_on(
    alone, parents, tmp_path, monkeypatch, stage, lost
):
    run, first = tmp_path / "run", ("--score.first", "2")
    ahead = DIRECTORIES[DIRECTORIES.index({"trace": "traces"}.get(stage, stage)) :]
    shutil.copytree(alone, run, ignore=shutil.ignore_patterns(*ahead, "*-book.safetensors"))
    one = command(parents[0], run, *first, mesh="model=2", stage=stage)
    with running(one, one, XLA_FLAGS=QUICK) as processes:
        while not [path for path in run.glob(MOMENTS[stage]) if path.stat().st_size]:
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.002)
        processes[lost].kill()
        found = ended(processes)
    left = found[1 - lost]
    assert found[lost].returncode == -signal.SIGKILL
    assert left.returncode == 1, left.stderr
    last = left.stderr.splitlines()[-1]
    assert last.startswith(f"{PROGRAM}: process {lost} (host {socket.gethostname()}) was lost: "), left.stderr
    assert "Check failure" not in left.stderr
    assert not (run / {"trace": "traces"}.get(stage, stage) / "stage.json").exists()
    if stage == "score":
        before = load_file(run / SCORE_TABLE)["values"]
        assert main(arguments(parents[0], run, *first, stage=stage)) == 0
        after, known = load_file(run / SCORE_TABLE)["values"], ~np.isnan(before)
        assert 0 < known.sum() < (~np.isnan(after)).sum()
        np.testing.assert_array_equal(after[known], before[known])  # one device alone would round differently
        return
    journaled, asked = sum(len(path.read_text().splitlines()) for path in run.glob(".traces.kept-*/*.jsonl")), []

    def counting(*args, on_answer, **options):
        return answer_questions(*args, on_answer=lambda *answer: asked.append(answer) or on_answer(*answer), **options)

    monkeypatch.setattr("puzzle_jax.search.traces.answer_questions", counting)
    assert main(arguments(parents[0], run, stage=stage)) == 0
    assert journaled > 0 and len(asked) == 9 * 3 - journaled  # 3, 2, 2 and 2 problems at three efforts
    for name in ("calibration", "validation", "confirmation", "heldout"):
        assert list(read_traces(run / f"traces/{name}.parquet")) == list(read_traces(alone / f"traces/{name}.parquet"))


@pytest.mark.once
def test_several_processes_go_on_from_the_scores_of_one(alone, parents, tmp_path):
    """With the table of one process, several have nothing left to score and write the same file."""
    run = tmp_path / "run"
    shutil.copytree(alone, run, ignore=shutil.ignore_patterns("score"))
    one = command(parents[0], run, mesh="model=2", stage="score")
    with running(one, one, XLA_FLAGS=QUICK) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [0, 0], [process.stderr for process in found]
    assert (run / "score/scores.json").read_bytes() == (alone / "score/scores.json").read_bytes()


# What they refuse ----------------------------------------------------------------------------------------------------


def test_a_mesh_that_does_not_fit_the_devices_is_refused_by_all(parents, tmp_path, capsys):
    sentence = "a mesh of 1 x 4 needs 4 devices, but 2 are present"
    one = command(parents[0], tmp_path / "run", mesh="model=4")
    with running(one, one, XLA_FLAGS=QUICK) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [2, 2]
    assert [process.stderr for process in found] == [f"{PROGRAM}: {sentence}\n"] * 2
    # Each process checks this by itself, before it waits for others.
    assert main(arguments(parents[0], tmp_path / "run", "--mesh", "processes=2,data=3")) == 2
    sentence = "mesh has 3 devices (data x sequence x model), but must have a multiple of mesh.processes (2)"
    assert capsys.readouterr().err == f"{PROGRAM}: {sentence}\n"
    assert not (tmp_path / "run").exists()


def test_what_the_mesh_does_not_divide_is_said_once():
    with pytest.warns(PuzzleWarning) as given:
        warn_of_undivided(chat_config(), 3)
    assert [str(warning.message) for warning in given] == [
        "mesh.model is 3, which does not divide the parent's 8 experts: every device holds and runs all of them"
    ]


@pytest.mark.once
def test_other_parents_of_equal_size_and_other_settings_are_refused_by_all(parents, tmp_path):
    run = tmp_path / "run"
    with running(command(parents[0], run), command(parents[1], run, "--score.per_call", "4")) as processes:
        found = ended(processes)
    where = f"process 1 (host {socket.gethostname()})"
    assert [process.returncode for process in found] == [2, 2], [process.stderr for process in found]
    assert found[0].stderr == found[1].stderr and found[0].stderr.count("\n") == 1
    assert found[0].stderr.startswith(f"{PROGRAM}: {where} differs from process 0 ")
    assert "parent.content is '" in found[0].stderr
    assert "recipe.score.per_call is 8 in process 0 and 4 in process 1" in found[0].stderr
    assert not run.exists()


@pytest.mark.once
def test_a_copy_of_the_parent_is_the_parent_and_a_missing_one_is_refused_by_all(parents, tmp_path):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(parents[0], copy)
    with running(command(parents[0], run), command(copy, tmp_path / "elsewhere"), XLA_FLAGS=QUICK) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [0, 0], [process.stderr for process in found]
    with running(command(parents[0], run), command(tmp_path / "gone", run), XLA_FLAGS=QUICK) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [2, 2], [process.stderr for process in found]
    assert found[0].stderr == found[1].stderr
    assert str(tmp_path / "gone") in found[0].stderr and "(in process 1, host " in found[0].stderr
