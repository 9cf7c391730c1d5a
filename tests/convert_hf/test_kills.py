"""Killed exports never leave half a checkpoint, and the next run resumes from what they leave.

A killed process does nothing more, so from the chosen point on a simulated kill makes every call that changes the disk
fail, including those of the clean-up.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.describe import describe_checkpoint
from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.convert_hf.tensors import writer as tensor_writer
from puzzle_jax.convert_hf.tensors.files import SINGLE
from puzzle_jax.errors import CheckpointError, PuzzleError
from tests.paths import ROOT

KEPT = ((0, 2, 3), (1, 4, 5, 6))
CHANGING = [(os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")]
STEPS = {False: 28, True: 41}  # calls of CHANGING in an export to a new place, and in one that replaces another
SHARDS = 5


def child_config(parent: ModelConfig) -> ModelConfig:
    blocks = zip(KEPT, parent.blocks, strict=True)
    return parent.with_blocks(tuple(BlockConfig(len(ids), block.window) for ids, block in blocks))


def export(parent: Path, out: Path, *, seed: int = 7, replace: bool = False) -> None:
    config = child_config(describe_checkpoint(parent).config)
    export_child(parent, out, config, KEPT, provenance={"seed": seed}, replace=replace, shard_bytes=40_000)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, bytes], dict[str, bytes]]:
    """A parent, the child that every export below must produce, and an earlier child that it replaces."""
    from tests.convert_hf.checkpoints import packable_config, write_random

    place = tmp_path_factory.mktemp("made")
    parent = write_random(place / "parent", packable_config((BlockConfig(7, 5), BlockConfig(7, None))))
    export(parent, place / "earlier", seed=1)
    shutil.copytree(place / "earlier", place / "child")
    for replace, directory in ((False, "new"), (True, "child")):
        with killed_at(sys.maxsize, killed) as seen:
            export(parent, place / directory, replace=replace)
        assert len(seen) == STEPS[replace], seen
    child = contents(place / "child")
    assert len(shards(child)) == SHARDS
    return parent, child, contents(place / "earlier")


def shards(names: Any) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


class Killed(BaseException):
    pass


@contextmanager
def killed_at(step: int, how: Callable[[], Any]) -> Iterator[list[str]]:
    """Calls `how` at every disk change from number `step` on; yields the names of the changes so far."""
    seen: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append(function.__name__)
            if len(seen) >= step:
                how()
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CHANGING:
            patch.setattr(module, name, counted(getattr(module, name)))
        yield seen


def killed() -> None:
    raise Killed


def check_left(place: Path, child: dict[str, bytes], earlier: dict[str, bytes] | None) -> None:
    """Everything under `place` is a whole checkpoint or none, and `out`, if it exists, is `child` or `earlier`."""
    out = place / "out"
    if out.exists():
        assert contents(out) in (child, earlier)
    for directory in place.iterdir():
        if directory.is_dir():
            try:
                describe_checkpoint(directory)
            except CheckpointError:
                continue
            assert contents(directory) in (child, earlier)


def check_resumed(parent: Path, place: Path, child: dict[str, bytes], *, replace: bool) -> None:
    """The next run keeps the recorded shards, completes, and leaves only its result."""
    journal = place / ".out.partial.json"
    recorded = json.loads(journal.read_text())["shards"] if journal.exists() else {}
    finished = {name: place / ".out.partial" / name for name in recorded}
    before = {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in finished.items() if path.exists()}
    export(parent, place / "out", replace=replace)
    after = {name: ((place / "out" / name).stat().st_ino, (place / "out" / name).stat().st_mtime_ns) for name in before}
    assert after == before
    assert contents(place / "out") == child
    assert [path.name for path in place.iterdir()] == ["out"]


KILLS = [(False, step) for step in range(1, STEPS[False] + 1, 2)] + [
    (True, step) for step in range(24, STEPS[True] + 1)
]


@pytest.mark.parametrize("replace, step", KILLS)
def test_a_killed_export_leaves_whole_things_and_goes_on(made, tmp_path, replace, step):
    parent, child, earlier = made
    if replace:
        shutil.copytree(parent.parent / "earlier", tmp_path / "out")
    with killed_at(step, killed) as seen, suppress(Killed):
        export(parent, tmp_path / "out", replace=replace)
    assert len(seen) >= step
    check_left(tmp_path, child, earlier if replace else None)
    check_resumed(parent, tmp_path, child, replace=True)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("step", [2, 10, 22])
def test_a_failing_export_cleans_up_or_goes_on(made, tmp_path, error, step):
    parent, child, _ = made
    failures = iter([error])

    def fail_once() -> None:
        for failure in failures:
            raise failure

    with killed_at(step, fail_once), pytest.raises(PuzzleError if error is OSError else error):
        export(parent, tmp_path / "out")
    check_left(tmp_path, child, None)
    assert error is not MemoryError or not list(tmp_path.iterdir())
    check_resumed(parent, tmp_path, child, replace=False)


DRIVER = """
import os, signal, sys
from pathlib import Path
from tests.convert_hf.test_kills import export, killed_at
parent, out, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
with killed_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
    export(parent, out)
"""


@pytest.mark.parametrize("step", [3, 9, 15, 22, 26])
def test_a_process_that_is_killed(made, tmp_path, step):
    parent, child, _ = made
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(parent), str(tmp_path / "out"), str(step)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    check_left(tmp_path, child, None)
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    check_resumed(parent, tmp_path, child, replace=False)


def test_a_process_that_is_killed_from_outside(made, tmp_path):
    """Another process kills it as soon as its third shard exists, wherever it is by then."""
    parent, child, _ = made
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", DRIVER, str(parent), str(tmp_path / "out"), "1000000"]
    process = subprocess.Popen(command, env=environment)
    while process.poll() is None:
        if len(list(tmp_path.glob(".out.partial/model-*"))) >= 3:
            process.kill()
            break
    process.wait()
    check_left(tmp_path, child, None)
    check_resumed(parent, tmp_path, child, replace=True)


def half_done(parent: Path, out: Path) -> list[str]:
    """An export killed in the middle; returns the shards that it finished."""
    with killed_at(10, killed), pytest.raises(Killed):
        export(parent, out)
    recorded = shards(json.loads((out.parent / ".out.partial.json").read_text())["shards"])
    assert 2 <= len(recorded) < SHARDS
    return recorded


@contextmanager
def written_shards() -> Iterator[list[str]]:
    written: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        original = tensor_writer.write_file
        patch.setattr(
            tensor_writer, "write_file", lambda path, tensors: written.append(path.name) or original(path, tensors)
        )
        yield written


def test_finished_shards_are_not_written_again(made, tmp_path):
    parent, child, _ = made
    finished = half_done(parent, tmp_path / "out")
    with written_shards() as written:
        export(parent, tmp_path / "out")
    assert sorted(written + finished) == shards(child) and contents(tmp_path / "out") == child


def test_a_parent_that_changed_starts_anew(made, tmp_path):
    parent = Path(shutil.copytree(made[0], tmp_path / "elsewhere" / "parent"))
    place = tmp_path / "place"
    place.mkdir()
    half_done(parent, place / "out")
    os.utime(parent / SINGLE, ns=(1, 1))
    with written_shards() as written:
        export(parent, place / "out")
    assert written == shards(made[1]) and contents(place / "out") == made[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"shards": {', '"shards": [{').replace("}}", "}]}"),
        lambda text: re.sub(r"\[\d+,", "[1e999,", text),
        lambda text: re.sub(r"\[\d+,", "[null,", text),
        lambda text: re.sub(r'"[0-9a-f]{64}"\]', '"0"]', text),
    ],
)
def test_a_damaged_journal_starts_anew(made, tmp_path, damage):
    parent, child, _ = made
    half_done(parent, tmp_path / "out")
    journal = tmp_path / ".out.partial.json"
    journal.write_text(damage(journal.read_text()))
    with written_shards() as written:
        export(parent, tmp_path / "out")
    assert written == shards(child) and contents(tmp_path / "out") == child
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_shard_is_written_again(made, tmp_path):
    parent, child, _ = made
    first, *_ = half_done(parent, tmp_path / "out")
    with (tmp_path / ".out.partial" / first).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([child[first][-1] ^ 1]))
    with written_shards() as written:
        export(parent, tmp_path / "out")
    assert first in written and contents(tmp_path / "out") == child


def test_two_exports_at_once(made, tmp_path, monkeypatch):
    parent, child, _ = made
    said = []
    original = tensor_writer.write_file

    def write_file(path: Path, tensors: Any) -> Any:
        if not said:
            with pytest.raises(PuzzleError, match=r"out is being written by another process$") as caught:
                export(parent, tmp_path / "out")
            said.append(caught.value)
        return original(path, tensors)

    monkeypatch.setattr(tensor_writer, "write_file", write_file)
    export(parent, tmp_path / "out")
    assert said and contents(tmp_path / "out") == child
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_disk(made, tmp_path, monkeypatch):
    parent, child, _ = made
    usage = namedtuple("usage", "total used free")
    finished = half_done(parent, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
        with pytest.raises(PuzzleError, match=r"out needs \d+ bytes, but its disk has 1000 left$"):
            export(parent, tmp_path / "out")
        with pytest.raises(PuzzleError, match=r"new needs \d+ bytes, but its disk has 1000 left$"):
            export(parent, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))
    with written_shards() as written:  # earlier finished shards stay
        export(parent, tmp_path / "out")
    assert sorted(written + finished) == shards(child)


def test_a_shard_that_reads_back_differently(made, tmp_path, monkeypatch):
    measured = tensor_writer._measured

    def one_bit(path: Path) -> tuple[int, str] | None:
        found = measured(path)
        return (found[0], "0" * 64) if found and "00003" in path.name else found

    monkeypatch.setattr(tensor_writer, "_measured", one_bit)
    with pytest.raises(CheckpointError, match=r"model-00003-of-\d+.safetensors reads back differently"):
        export(made[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())
