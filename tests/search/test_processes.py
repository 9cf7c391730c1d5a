"""Searches of several processes: whom they are, what they refuse together, and that a lost one ends the other."""

import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.search.workers import Team
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.processes.start import ended, running
from tests.search.test_pipeline import SETTINGS
from tests.support import chat_config, random_params

PROGRAM = "puzzle search"
WHERE = f"process 1 (host {socket.gethostname()})"


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> list[Path]:
    """Two parents whose files have the same sizes."""
    config, root = chat_config(), tmp_path_factory.mktemp("parents")
    for seed in range(2):
        params = random_params(config, seed)
        save_checkpoint(root / f"of-{seed}", config, params, config_base={}, extra_files=chat_files())
    sizes = [{file.name: file.stat().st_size for file in (root / f"of-{seed}").iterdir()} for seed in range(2)]
    assert sizes[0] == sizes[1]
    return [root / "of-0", root / "of-1"]


def command(parent: Path, run: Path, *arguments: str, stage: str = "cost") -> list[str]:
    return [
        *("puzzle_jax.search", stage, "--parent", str(parent), "--run", str(run), *SETTINGS),
        *("--mesh.processes", "2", *arguments),
    ]


def test_a_process_alone_needs_nobody():
    with Team.join(1, 8, program="prog") as team:
        assert (team.count, team.index) == (1, 0)
        team.broadcast("nothing")


def test_other_parents_of_equal_size_and_other_settings_are_refused_by_all(parents, tmp_path):
    run = tmp_path / "run"
    with running(command(parents[0], run), command(parents[1], run, "--score.per_call", "4")) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [2, 2], [process.stderr for process in found]
    assert found[0].stderr == found[1].stderr and found[0].stderr.count("\n") == 1
    assert found[0].stderr.startswith(f"{PROGRAM}: {WHERE} differs from process 0 ")
    assert "parent.content is '" in found[0].stderr
    assert "recipe.score.per_call is 8 in process 0 and 4 in process 1" in found[0].stderr
    assert not run.exists()


def test_a_copy_of_the_parent_is_the_parent_and_a_missing_one_is_refused_by_all(parents, tmp_path):
    copy, run = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(parents[0], copy)
    with running(command(parents[0], run), command(copy, tmp_path / "elsewhere")) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [0, 0], [process.stderr for process in found]
    with running(command(parents[0], run), command(tmp_path / "gone", run)) as processes:
        found = ended(processes)
    assert [process.returncode for process in found] == [2, 2], [process.stderr for process in found]
    assert found[0].stderr == found[1].stderr
    assert str(tmp_path / "gone") in found[0].stderr and "(in process 1, host " in found[0].stderr


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_search_that_loses_a_process_ends_in_a_sentence(parents, tmp_path, lost):
    run = tmp_path / "run"
    with running(command(parents[0], run, stage="all"), command(parents[0], run, stage="all")) as processes:
        while not (run / "traces").exists():  # scoring comes soon, or has begun
            assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
            time.sleep(0.1)
        processes[lost].kill()
        found = ended(processes)
    left = found[1 - lost]
    assert found[lost].returncode == -signal.SIGKILL
    assert left.returncode == 1, left.stderr
    last = left.stderr.splitlines()[-1]
    assert last.startswith(f"{PROGRAM}: process {lost} (host {socket.gethostname()}) was lost: "), left.stderr
    assert "Check failure" not in left.stderr
