"""The processes of a program end together: what one refuses all refuse, and the loss of one ends the others."""

import re
import signal
import socket
import subprocess

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.processes.distributed import agree, from_primary, joined, kv_delete, on_all, on_primary
from tests.processes.start import ended, running

HOST = socket.gethostname()


def run(*actions: str) -> list[subprocess.CompletedProcess]:
    """Runs one process per entry of `actions` (see `tests.processes.joined_program`); returns how each ended."""
    with running(*[["tests.processes.joined_program", str(len(actions)), *actions]] * len(actions)) as processes:
        return ended(processes)


def struck(number: signal.Signals, index: int, *actions: str) -> list[subprocess.CompletedProcess]:
    """Like `run`, but sends one process a signal once all have reached their action "ready"."""
    with running(*[["tests.processes.joined_program", str(len(actions)), *actions]] * len(actions)) as processes:
        for process in processes:
            assert process.stdout is not None
            while "ready" not in (line := process.stdout.readline()):
                assert line, process.communicate()
        processes[index].send_signal(number)
        return ended(processes)


def test_a_process_alone_agrees_with_itself():
    with joined(1, program="prog"):
        agree("the recipe", {"seed": 1})
        assert on_all("open", lambda: 3) == 3
        assert from_primary("where", lambda: "here") == "here"
        on_primary("write", lambda: None)
        kv_delete("nothing")


@pytest.mark.parametrize("index", ["2", "-1", "one", ""])
def test_an_index_that_no_process_has(monkeypatch, index):
    monkeypatch.setenv("JAX_PROCESS_ID", index)
    with (
        pytest.raises(ConfigError, match=f"JAX_PROCESS_ID is '{index}', but must be from 0 to 1"),
        joined(2, program="prog"),
    ):
        pass


def test_processes_that_nobody_told_of_each_other(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with (
        pytest.raises(ConfigError, match=r"mesh\.processes is 3, but they cannot be brought together") as raised,
        joined(3, 2, program="prog"),
    ):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_processes_that_are_never_started_are_not_waited_for_without_end(index):
    there = ["tests.processes.joined_program", "2", "sleep"]
    commands = [there, ["this"]] if index == 0 else [["this"], there]  # a standard library module that ends
    with running(*commands, JOIN_SECONDS="4") as processes:
        (process,) = ended(processes[index : index + 1])
    assert process.returncode == 2
    (sentence,) = (line for line in process.stderr.splitlines() if line.startswith("prog: "))
    assert "mesh.processes is 2, but not all of them were started within 4 seconds" in sentence


def test_processes_that_work_together_end_together():
    processes = run("agree+open+primary+collect+rest", "agree+open+primary+collect")
    assert [(process.returncode, process.stderr) for process in processes] == [(0, "")] * 2


def test_what_differs_is_refused_by_all_in_one_sentence_that_names_it():
    sentence = (
        f"prog: process 1 (host {HOST}) differs from process 0 (host {HOST}) in the recipe: parent.content is 'ab' in "
        "process 0 and 'cd' in process 1; steps is [1, 2] in process 0 and [1, 3] in process 1\n"
    )
    assert [(p.returncode, p.stderr) for p in run("agree+sleep", "agree-otherwise+sleep")] == [(2, sentence)] * 2


@pytest.mark.parametrize(
    ("actions", "where"),
    [
        (("open+sleep", "open-missing"), f" (in process 1, host {HOST})"),  # one cannot open its input
        pytest.param(("open-missing", "open-missing"), "", marks=pytest.mark.slow),
        (("collect", "refuse"), f" (in process 1, host {HOST})"),  # while the other hangs in a collective operation
        pytest.param(("refuse", "wait"), "", marks=pytest.mark.slow),
    ],
)
def test_what_one_refuses_all_refuse(actions, where):
    sentence = f"prog: scissors are not paper{where}\n"
    assert [(process.returncode, process.stderr) for process in run(*actions)] == [(2, sentence)] * 2


@pytest.mark.parametrize(
    ("lost", "actions"),
    [
        pytest.param(0, ("ready+sleep", "ready+sleep"), marks=pytest.mark.slow),
        (0, ("ready+sleep", "ready+collect")),
        pytest.param(0, ("ready+sleep", "ready+wait"), marks=pytest.mark.slow),
        pytest.param(1, ("ready+sleep", "ready+sleep"), marks=pytest.mark.slow),
        (1, ("ready+collect", "ready+sleep")),
        pytest.param(2, ("ready+sleep", "ready+collect", "ready+sleep"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_ends_the_others_in_one_sentence(lost, actions):
    processes = struck(signal.SIGKILL, lost, *actions)
    assert processes.pop(lost).returncode == -signal.SIGKILL
    for process in processes:
        assert process.returncode == 1, process.stderr
        assert re.fullmatch(rf"prog: process {lost} \(host {re.escape(HOST)}\) was lost: .*\n", process.stderr)


@pytest.mark.slow
def test_a_terminated_process_ends_at_once_and_is_a_loss():
    one, two = struck(signal.SIGTERM, 1, "ready+sleep", "ready+sleep")
    assert (one.returncode, two.returncode) == (1, -signal.SIGTERM)
    assert one.stderr.startswith(f"prog: process 1 (host {HOST}) was lost: ")


def test_an_interrupt_is_no_loss():
    processes = struck(signal.SIGINT, 1, "ready+sleep", "ready+sleep")
    assert [process.returncode for process in processes] == [130, 130]
    assert processes[0].stderr == f"prog: process 1 (host {HOST}) was interrupted\n"


def test_an_error_of_ours_in_one_process_is_named_in_the_others():
    one, two = run("collect", "crash")
    assert (one.returncode, two.returncode) == (1, 1)
    assert one.stderr == f"prog: process 1 (host {HOST}) failed with ValueError: 'a bug'; its own output says more\n"
    assert "Traceback" in two.stderr and two.stderr.endswith("ValueError: a bug\n")
