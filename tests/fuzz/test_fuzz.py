"""Damaged input of every kind, by seed: no traceback, no long run, no harm to what was there.

Each case is one seed of one kind, and can be run again by its name. It calls a verb in a process that serves all cases,
on input that is refused or accepted before heavy work, so that it costs milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle_jax.cli import main
from puzzle_jax.generate.traces import Trace, write_traces
from tests.fuzz.kinds import KINDS, OUTPUTS, RECIPE
from tests.paths import ROOT
from tests.waiting import HANG

SECONDS, MEMORY_BYTES, LONGEST_MESSAGE = 60, 4 << 30, 6000
DEFAULT, ALL = 100, 2000


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Sound files, of which cases damage copies: a recipe, files of traces, and a run with costs and traces."""
    root = tmp_path_factory.mktemp("originals")
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    traces = [Trace("add", "low", n, {"steps": n}, (5, 6, n % 90), (8, 9, 1), 1.0, False) for n in range(8)]
    write_traces(root / "traces.parquet", traces)
    write_traces(root / "traces.jsonl", traces)
    arguments = ["--recipe", str(recipe), "--run", str(root / "run"), "--traces.file", str(root / "traces.jsonl")]
    with contextlib.redirect_stdout(io.StringIO()):
        assert [main(["search", stage, *arguments]) for stage in ("cost", "trace")] == [0, 0]
    return root


CASES = [(name, seed) for seed in range(-(-ALL // len(KINDS))) for name in KINDS][:ALL]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [case if index < DEFAULT else pytest.param(*case, marks=pytest.mark.slow) for index, case in enumerate(CASES)],
)
def test_damaged_input(kind, seed, originals, worker, tmp_path):
    command = KINDS[kind](random.Random(f"{kind} {seed}"), tmp_path, originals)
    before, given = _content(originals), _content(tmp_path)
    found = worker.ask(tmp_path, command)
    assert not found["bug"], (command, found["bug"])
    lines = [line for line in found["err"].splitlines() if ": warning: " not in line and not line.startswith("  ")]
    assert found["code"] in (0, 2), (command, found)
    assert "Traceback" not in found["err"] + found["out"]
    if found["code"] == 2:
        assert len(lines) == 1 and len(lines[0]) < LONGEST_MESSAGE, (command, lines)
    assert _content(originals) == before
    after = _content(tmp_path)
    assert {name for name in after if name not in given and name.partition("/")[0] not in OUTPUTS} == set(), command
    assert all(after.get(name) == content for name, content in given.items() if name.partition("/")[0] not in OUTPUTS)
    assert found["memory"] < MEMORY_BYTES and found["seconds"] < SECONDS


def test_kinds_are_those_of_a_seed(tmp_path):
    """A case that failed once fails again: its damage follows from its name alone."""
    made = []
    for place in (tmp_path / "one", tmp_path / "two"):
        place.mkdir()
        command = KINDS["scenarios"](random.Random("scenarios 7"), place, tmp_path)
        made.append(([word.replace(str(place), "") for word in command], (place / "scenario.yaml").read_bytes()))
    assert made[0] == made[1]
    assert made[0][0][:2] == ["search", "estimate"]


class Worker:
    """A process that runs commands; after it had to be killed, a new one is started."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, directory: Path, command: list[str]) -> dict[str, Any]:
        if self.process is None:
            command_line = [sys.executable, "-m", "tests.fuzz.worker"]
            self.process = subprocess.Popen(command_line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), "command": command}).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], HANG)[0]:
            self.end()
            raise AssertionError(f"{command} hangs")
        line = self.process.stdout.readline()
        if not line:
            self.end()
            raise AssertionError(f"{command} ended its process")
        return json.loads(line)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def worker():
    found = Worker()
    yield found
    found.end()


def _content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
