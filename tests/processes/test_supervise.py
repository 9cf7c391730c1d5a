"""All descendants of a supervised process end with it, however they detached, and no other process does."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from puzzle_jax.processes.supervise import descendants, kill_descendants
from tests.waiting import wait_until

WORKER = """
import os, sys, time
from puzzle_jax.processes.supervise import supervise

supervise(int(sys.argv[1]))
for number in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)  # the daemon's parent is gone at once
        os.setsid()
        with open(f"{sys.argv[2]}/new-{number}", "w") as file:
            file.write(str(os.getpid()))
        os.rename(f"{sys.argv[2]}/new-{number}", f"{sys.argv[2]}/daemon-{number}")
        time.sleep(3600)
        os._exit(0)
while len(os.listdir(sys.argv[2])) < 2 or any(name.startswith("new") for name in os.listdir(sys.argv[2])):
    time.sleep(0.01)
"""
ENDS = {
    "returns": ("", 0),
    "exits": ("os._exit(7)", 7),
    "raises": ("raise SystemExit(5)", 5),
    "is killed": ("os.kill(os.getpid(), 9)", -9),
    "is terminated": ("os.kill(os.getpid(), 15)", -15),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems know no child subreapers")


def started(directory: Path, end: str) -> subprocess.Popen:
    directory.mkdir()
    command = [sys.executable, "-c", WORKER + end, str(os.getpid()), str(directory)]
    return subprocess.Popen(command, start_new_session=True)


def daemons(directory: Path) -> list[int]:
    """Process ids of the daemons, once both run."""
    files = [directory / f"daemon-{number}" for number in range(2)]
    wait_until(lambda: all(file.exists() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("how", ENDS)
def test_daemons_end_with_the_worker_which_ends_as_it_would_alone(tmp_path, how):
    end, code = ENDS[how]
    process = started(tmp_path / "daemons", end)
    assert process.wait(60) == code
    assert not any(Path(f"/proc/{pid}").exists() for pid in daemons(tmp_path / "daemons"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_supervisor_that_is_told_to_end_takes_the_worker_along_and_nothing_else(tmp_path, number):
    other = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    process = started(tmp_path / "daemons", "\nwhile True: pass")
    inside = daemons(tmp_path / "daemons")
    (worker,) = set(descendants(process.pid)) - set(inside)
    process.send_signal(number)
    assert process.wait(60) == -signal.SIGKILL
    # SIGKILL leaves the supervisor no time: the system ends the worker, and daemons stay.
    wait_until(lambda: not running(worker))
    assert all(running(pid) == (number == signal.SIGKILL) for pid in inside)
    for pid in inside:
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    assert running(other.pid)
    other.kill()
    other.wait()


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def test_descendants_are_found_and_killed_but_no_one_else(tmp_path):
    first, second = (
        subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '3600'])"])
        for _ in range(2)
    )
    wait_until(lambda: len(descendants(first.pid)) == len(descendants(second.pid)) == 1)
    assert set(descendants(os.getpid())) >= {first.pid, second.pid, *descendants(first.pid), *descendants(second.pid)}
    (inner,) = descendants(first.pid)
    kill_descendants(first.pid)
    assert not running(inner) and descendants(first.pid) == [] and len(descendants(second.pid)) == 1
    assert first.wait(60) == 0
    kill_descendants(second.pid)
    second.wait(60)
