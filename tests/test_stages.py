"""Stages: what reruns, what is skipped, and that nothing half done or foreign is touched."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial

import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import open_run
from puzzle_jax.stages import Stage, StageResult, edited_output

PARENT = {"parent": "tiny", "sha256": "ab"}


def run_stage(run_dir, name, settings, inputs, produce, directory="") -> StageResult:
    stage = Stage(name, lambda _: inputs, lambda _: settings, lambda _, out, kept: produce(out, kept), directory)
    return stage.run(run_dir, None)


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path / "runs" / "tiny", PARENT)


class Produce:
    """Writes one file and counts its calls."""

    def __init__(self, text="result", name="out.txt"):
        self.text, self.name, self.calls = text, name, 0

    def __call__(self, directory, kept):
        self.calls += 1
        (directory / self.name).parent.mkdir(parents=True, exist_ok=True)
        (directory / self.name).write_text(self.text)


def everything(run):
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_first_run_writes_outputs_and_record(run):
    produce = Produce(name="deep/er/out.txt")
    stage = run_stage(run, "score", {"tokens": 8}, [], produce)
    assert (stage.skipped, stage.reason, stage.directory) == (False, "not run yet", run / "score")
    assert (run / "score/deep/er/out.txt").read_text() == "result"
    record = json.loads((run / "score/stage.json").read_text())
    assert record["settings"] == {"tokens": 8} and record["key"] == stage.key
    assert list(record["outputs"]) == ["deep/er/out.txt"]
    assert record["seconds"] >= 0 and {"jax", "puzzle_jax"} <= set(record)
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "score"]


def test_unchanged_is_skipped_and_changes_rerun(run, tmp_path):
    source = tmp_path / "input.bin"
    source.write_bytes(b"one")
    produce = Produce()
    first = run_stage(run, "score", {"tokens": 8, "windows": (4, 2)}, [source], produce)
    os.utime(source, (1, 1))  # a new modification time is not a change
    again = run_stage(run, "score", {"tokens": 8, "windows": [4, 2]}, [source], produce)
    assert again.skipped and again.key == first.key and again.seconds == first.seconds and produce.calls == 1
    other = run_stage(run, "score", {"tokens": 9, "windows": [4, 2]}, [source], produce)
    assert not other.skipped and other.reason == "changed: settings.tokens 8 -> 9" and produce.calls == 2
    source.write_bytes(b"two")
    other = run_stage(run, "score", {"tokens": 9, "windows": [4, 2]}, [source], produce)
    assert other.reason == f"changed: {source.resolve()}" and produce.calls == 3
    (run / "score/out.txt").unlink()
    other = run_stage(run, "score", {"tokens": 9, "windows": [4, 2]}, [source], produce)
    assert other.reason == "out.txt is gone" and produce.calls == 4


def test_equal_results_of_a_rerun_let_later_stages_be_skipped(run):
    later = Produce()
    for tokens in (1, 2):
        run_stage(run, "trace", {"tokens": tokens}, [], Produce("same"))
        stage = run_stage(run, "rank", {}, [run / "trace"], later)
    assert stage.skipped and later.calls == 1
    run_stage(run, "trace", {"tokens": 3}, [], Produce("other"))
    assert run_stage(run, "rank", {}, [run / "trace"], later).reason == "changed: trace.out.txt"


def test_a_moved_run_is_still_unchanged(run, tmp_path):
    run_stage(run, "trace", {}, [], Produce())
    run_stage(run, "rank", {}, [run / "trace/out.txt"], Produce())
    moved = run.rename(tmp_path / "elsewhere")
    assert run_stage(moved, "rank", {}, [moved / "trace/out.txt"], Produce()).skipped


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_stage_that_fails_leaves_the_earlier_state(run, error):
    run_stage(run, "score", {"tokens": 8}, [], Produce("good"))
    before = everything(run)

    def fail(directory, kept):
        (directory / "out.txt").write_text("half")
        raise error

    with pytest.raises(error):
        run_stage(run, "score", {"tokens": 9}, [], fail)
    with pytest.raises(error):
        run_stage(run, "rank", {}, [], fail)
    assert everything(run) == before
    assert run_stage(run, "score", {"tokens": 8}, [], Produce()).skipped


KILLED = """
    import sys, time
    from pathlib import Path
    from puzzle_jax.stages import Stage

    def produce(context, directory, kept):
        (directory / "out.txt").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

    Stage("score", lambda _: [], lambda _: {"tokens": 9}, produce).run(Path(sys.argv[1]), None)
"""


def test_a_killed_process_leaves_no_half_file_and_the_next_cleans_up(run):
    run_stage(run, "score", {"tokens": 8}, [], Produce("good"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    with pytest.raises(PuzzleError, match="another process works in"):
        run_stage(run, "rank", {}, [], Produce())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (run / "score/out.txt").read_text() == "good"
    assert len(list(run.iterdir())) == 3  # including what the killed process had begun
    assert not run_stage(run, "score", {"tokens": 9}, [], Produce("new")).skipped
    assert (run / "score/out.txt").read_text() == "new"
    assert sorted(p.name for p in run.iterdir()) == ["run.json", "score"]


def test_what_an_interrupted_stage_kept_is_there_again_for_the_same_key_alone(run):
    seen = []

    def produce(directory, kept, fails):
        seen.append((kept / "rows.txt").read_text() if kept.exists() else None)
        kept.mkdir(exist_ok=True)
        (kept / "rows.txt").write_text(f"{seen[-1] or ''}+")
        if fails:
            raise KeyboardInterrupt
        (directory / "out.txt").write_text("done")

    def stage(tokens, fails):
        run_stage(run, "trace", {"tokens": tokens}, [], partial(produce, fails=fails))

    for tokens in (8, 8, 9):
        with pytest.raises(KeyboardInterrupt):
            stage(tokens, fails=True)
    assert seen == [None, "+", None]
    stage(8, fails=False)
    assert seen[-1] == "++" and sorted(p.name for p in run.iterdir()) == ["run.json", "trace"]
    stage(9, fails=False)
    assert seen[-1] is None  # what was kept for another key is deleted when the stage is done


def test_killed_between_the_two_renames_the_old_result_comes_back(run):
    run_stage(run, "score", {}, [], Produce("good"))
    (run / "score").rename(run / ".score.replaced-123")
    assert run_stage(run, "score", {}, [], Produce()).skipped
    assert (run / "score/out.txt").read_text() == "good"


def test_foreign_files_are_neither_overwritten_nor_deleted(run):
    produce = Produce()
    run_stage(run, "score", {"tokens": 8}, [], produce)
    (run / "score/notes.txt").write_text("mine")
    assert run_stage(run, "score", {"tokens": 8}, [], produce).skipped
    with pytest.raises(PuzzleError, match=r"notes\.txt was not written by stage 'score'; move it"):
        run_stage(run, "score", {"tokens": 9}, [], produce)
    (run / "score/notes.txt").unlink()
    (run / "score/out.txt").write_text("edited")
    later = Produce()
    assert not run_stage(run, "solve", {}, [run / "score/out.txt"], later).skipped
    assert run_stage(run, "score", {"tokens": 8}, [], produce).skipped  # an edited output is accepted as it is
    with pytest.raises(PuzzleError, match=r"out\.txt was changed after stage 'score' wrote it"):
        run_stage(run, "score", {"tokens": 9}, [], produce)
    assert produce.calls == 1 and (run / "score/out.txt").read_text() == "edited"
    (run / "child").mkdir()
    (run / "child/model.safetensors").write_text("theirs")
    with pytest.raises(PuzzleError, match="was not written by stage 'assemble'"):
        run_stage(run, "assemble", {}, [], produce, directory="child")
    assert (run / "child/model.safetensors").read_text() == "theirs"


def test_missing_input_is_refused_before_work(run):
    produce = Produce()
    with pytest.raises(PuzzleError, match=r"stage 'score' needs .*traces, which does not exist; run the stage"):
        run_stage(run, "score", {}, [run / "traces"], produce)
    assert produce.calls == 0


def test_directories_that_are_no_run_or_another_one_are_refused(tmp_path, run):
    before = everything(run)
    assert open_run(run, dict(reversed(PARENT.items()))) == run
    with pytest.raises(PuzzleError, match=r'holds another run \(sha256 "ab" -> "cd"\); name another directory'):
        open_run(run, {**PARENT, "sha256": "cd"})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/photo.jpg").write_text("x")
    with pytest.raises(PuzzleError, match=r"holds files that are no run's \(photo.jpg\)"):
        open_run(tmp_path / "full", PARENT)
    with pytest.raises(PuzzleError, match="is a file"):
        open_run(tmp_path / "full/photo.jpg", PARENT)
    with pytest.raises(PuzzleError, match=r"is no run directory: it holds no run\.json"):
        run_stage(tmp_path / "full", "score", {}, [], Produce())
    (run / "run.json").write_text("{")
    with pytest.raises(PuzzleError, match="cannot be read as JSON"):
        open_run(run, PARENT)
    (run / "run.json").write_bytes(before["run.json"])
    assert everything(run) == before


def test_large_inputs_are_known_by_size_time_and_ends(run, tmp_path, monkeypatch):
    monkeypatch.setattr("puzzle_jax.stages._WHOLE_HASH_BYTES", 1 << 20)
    source = tmp_path / "weights.bin"
    source.write_bytes(b"a" * (3 << 20))
    produce = Produce()
    run_stage(run, "score", {}, [source], produce)
    assert run_stage(run, "score", {}, [source], produce).skipped
    source.write_bytes(b"a" * (3 << 20) + b"b")
    assert not run_stage(run, "score", {}, [source], produce).skipped


def test_a_skip_is_quick_enough_to_be_unseen(run):
    """No wall-clock bound: a skip must not call `produce`, read outputs, or write anything."""
    run_stage(run, "score", {}, [], Produce())
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    time.sleep(0.01)
    run_stage(run, "score", {}, [], Produce())
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.pop("key"), "the value has no field 'key'"),
        (lambda r: r.pop("seconds"), "the value has no field 'seconds'"),
        (lambda r: r.update(seconds="long"), "seconds is a text, but must be a number"),
        (lambda r: r.update(seconds=True), "seconds is true or false, but must be a number"),
        (lambda r: r.pop("outputs"), "the value has no field 'outputs'"),
        (lambda r: r.update(outputs=5), "outputs is a whole number, but must be an object"),
        (lambda r: r.update(outputs={"../../x": "ab"}), "outputs has .* but must be digests by paths below"),
        (lambda r: r.update(outputs={"/etc/passwd": "ab"}), "outputs has"),
        (lambda r: r.update(outputs={"out.txt": 5}), "outputs.* is a whole number, but must be a text"),
    ],
)
def test_a_record_that_no_stage_wrote_is_refused_by_field(run, change, words):
    run_stage(run, "score", {}, [], Produce("good"))
    record = json.loads((run / "score/stage.json").read_text())
    change(record)
    (run / "score/stage.json").write_text(json.dumps(record))
    before = everything(run)
    with pytest.raises(PuzzleError, match=f"score/stage.json: {words}.*; move .*score away to run the stage again"):
        run_stage(run, "score", {}, [], Produce())
    assert everything(run) == before


def test_a_linked_stage_is_skipped_but_neither_replaced_nor_followed(run, tmp_path):
    run_stage(run, "score", {"tokens": 8}, [], Produce("good"))
    (run / "score").rename(tmp_path / "elsewhere")
    (run / "score").symlink_to(tmp_path / "elsewhere")
    assert run_stage(run, "score", {"tokens": 8}, [], Produce()).skipped
    with pytest.raises(PuzzleError, match="score is a symbolic link, but stage 'score' replaces its directory"):
        run_stage(run, "score", {"tokens": 9}, [], Produce("other"))
    (run / ".score.replaced-7").symlink_to(tmp_path / "elsewhere")  # as an older release left it after such a rerun
    assert run_stage(run, "score", {"tokens": 8}, [], Produce()).skipped
    assert (tmp_path / "elsewhere/out.txt").read_text() == "good" and not (run / ".score.replaced-7").exists()
    (run / "score").unlink()
    (run / "score").write_text("a file")
    with pytest.raises(PuzzleError, match="score is a file, but must be the directory of stage 'score'"):
        run_stage(run, "score", {"tokens": 8}, [], Produce())


def test_an_edited_output_is_found(run):
    run_stage(run, "score", {}, [], Produce("good"))
    assert edited_output(run) is None
    (run / "score/out.txt").write_text("edited")
    assert edited_output(run) == run / "score/out.txt"
