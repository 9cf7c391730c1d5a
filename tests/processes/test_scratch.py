"""Scratch directories are removed with their process."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from puzzle_jax.processes.scratch import scratch_directory

PROGRAM = """
from puzzle_jax.processes.scratch import scratch_directory
with scratch_directory() as directory:
    (directory / "file").write_text("words")
    print(directory, flush=True)
    input()
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "puzzle_jax-run-of-somebody").mkdir()  # has no lock file, so it is not a scratch directory
    return tmp_path


def test_it_is_there_as_long_as_it_is_used(temporary):
    with scratch_directory() as one, scratch_directory() as other:
        assert one.parent == other.parent == temporary and one != other
        assert one.is_dir() and other.is_dir()
    assert [path.name for path in temporary.iterdir()] == ["puzzle_jax-run-of-somebody"]


def test_what_a_killed_process_left_is_removed_and_what_one_holds_is_not(temporary):
    command = [sys.executable, "-c", PROGRAM]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(temporary), "PATH": ""}
    owners = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, held = [Path(owner.stdout.readline().strip()) for owner in owners if owner.stdout is not None]
    owners[0].kill()
    owners[0].communicate()
    assert (killed / "file").is_file()
    with scratch_directory():
        assert not killed.exists() and (held / "file").is_file()
    owners[1].communicate("\n")
    assert owners[1].returncode == 0 and not held.exists()
