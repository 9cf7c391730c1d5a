"""Reward workers: scores equal those computed directly, and a function that fails costs only its own sample.

The time limits are generous: a hang sleeps for an hour, and what ends by itself is waited for.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks import TASKS, Problem, get_task, problems
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.tasks.rewards.source import reward_file
from puzzle_jax.tasks.rewards.workers import RewardWorkers
from tests.waiting import HANG, wait_until

pytestmark = pytest.mark.once  # processes that end in every way, none of which uses JAX

LIMIT = 3.0
TOO_LONG = Reward(None, "took longer than 3 s")

BEHAVIOURS = """
from __future__ import annotations

import ctypes, os, signal, subprocess, sys, time
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

@dataclass
class Kept:
    name: ClassVar[str] = "kept"

class Silent(Exception):
    def __str__(self):
        raise RuntimeError

def raises():
    raise ValueError("no\\n  number \\x1b[2J")

def silent():
    raise Silent

def wordy():
    raise ValueError("a" * 10**6)

def interrupts():
    raise KeyboardInterrupt

def recurses():
    return recurses()

def starts_another():
    child = subprocess.Popen(["sleep", "3600"])
    with open(os.environ["CHILD"], "w") as file:
        file.write(str(child.pid))
    time.sleep(3600)

def leaves_a_daemon():
    if os.fork() == 0:
        os.setsid()
        with open(os.environ["CHILD"], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(3600)
    while not os.path.exists(os.environ["CHILD"]) or not os.path.getsize(os.environ["CHILD"]):
        time.sleep(0.01)
    os._exit(3)

def prints():
    print("a line", flush=True)
    os.write(1, b"bytes" * 100)
    subprocess.run(["echo", "from a child"], check=True)
    return 0.25

def reads():
    return len(sys.stdin.read()) + 0.5

def forks():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return 0.75
    sys.exit()

def alarms():
    def ring(*_):
        raise TimeoutError("own alarm")
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(1)
    time.sleep(3600)

WAYS = {
    "raises": raises, "silent": silent, "wordy": wordy, "interrupts": interrupts, "recurses": recurses,
    "leaves": lambda: sys.exit(4), "exits": lambda: os._exit(3), "killed": lambda: os.kill(os.getpid(), 9),
    "hangs": lambda: time.sleep(3600), "hangs in C": lambda: ctypes.PyDLL(None).sleep(3600),  # and keeps the GIL
    "starts another": starts_another,
    "leaves a daemon": leaves_a_daemon, "prints": prints, "reads": reads, "forks": forks, "alarms": alarms,
    "nan": lambda: float("nan"), "inf": lambda: -np.inf, "none": lambda: None, "text": lambda: "1",
    "beyond": lambda: -1e39, "large": lambda: 1e30,
    "list": lambda: [1.0], "array": lambda: np.ones(2), "complex": lambda: 1j, "huge": lambda: 10**400,
    "true": lambda: True, "whole": lambda: -7, "fraction": lambda: Fraction(1, 4), "numpy": lambda: np.float32(2.5),
    "one": lambda: np.array(1.5), "jax": lambda: "jax" in sys.modules,
}

def reward(answer, score):
    return WAYS[answer.final]() if answer.final in WAYS else answer.tokens + score()
"""

EXPECTED = {
    "raises": Reward(None, r"raised ValueError: no number \x1b[2J"),
    "silent": Reward(None, "raised Silent"),
    "wordy": Reward(None, f"raised ValueError: {'a' * 197}..."),
    "interrupts": Reward(None, "raised KeyboardInterrupt"),
    "recurses": Reward(None, "raised RecursionError: maximum recursion depth exceeded"),
    "leaves": Reward(None, "raised SystemExit: 4"),
    "exits": Reward(None, "ended its process with exit code 3"),
    "killed": Reward(None, "ended its process by signal 9"),
    "prints": Reward(0.25, None),
    "reads": Reward(0.5, None),
    "forks": Reward(0.75, None),
    "alarms": Reward(None, "raised TimeoutError: own alarm"),
    "nan": Reward(None, "returned nan"),
    "inf": Reward(None, "returned -inf"),
    "none": Reward(None, "returned None"),
    "text": Reward(None, "returned '1'"),
    "beyond": Reward(None, "returned -1e+39, beyond 1e+30"),
    "large": Reward(1e30, None),
    "list": Reward(None, "returned a list"),
    "array": Reward(None, "returned a ndarray"),
    "complex": Reward(None, "returned a complex"),
    "true": Reward(1.0, None),
    "whole": Reward(-7.0, None),
    "fraction": Reward(0.25, None),
    "numpy": Reward(2.5, None),
    "one": Reward(1.5, None),
    "jax": Reward(0.0, None),
}


def answer(final: str = "1", tokens: int = 10, truncated: bool = False, problem: Problem | None = None) -> Answer:
    return Answer(problem or TASKS["chain"].sample(0), "low", "so", final, tokens, truncated)


def written(path, program: str) -> str:
    path.write_text(textwrap.dedent(program))
    return str(path)


def process_ids(workers: RewardWorkers) -> list[int]:
    return [worker.process.pid for worker in workers._workers]


def alive(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, text=True).stdout
    return state.strip()[:1] not in ("", "Z")


def child_started() -> int:
    """Id of the process that the behaviour "starts another" or "leaves a daemon" has started."""
    file = Path(os.environ["CHILD"])
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


@pytest.fixture
def behaviours(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    return written(tmp_path / "behaviours.py", BEHAVIOURS) + ":reward"


def test_scores_are_those_of_the_tasks_with_any_number_of_processes(tmp_path):
    rows = [{"prompt": f"{n}?", "answer": f"{n},000", "match": ("exact", "contains")[n % 2]} for n in range(1, 9)]
    file = written(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, rows)))
    names = [*TASKS, file]
    try:
        import reasoning_gym  # noqa: F401

        names += ["reasoning-gym:countdown", "reasoning-gym:spell_backward"]
    except ImportError:
        pass
    answers, direct = [], []
    for name in names:
        task = get_task(name)
        for problem in itertools.islice(problems(task), 6):
            for final in (problem.answer, f" {problem.answer}\n", problem.answer[:-1], "1000", "It is 1,000", ""):
                answers.append(answer(final, problem=problem))
                direct.append(Reward(task.score(problem, final), None))
    assert {0.0, 1.0} <= {reward.reward for reward in direct}
    for processes in (1, 2):
        with RewardWorkers(processes=processes) as workers:
            assert workers.rewards(answers) == direct
            assert len(process_ids(workers)) == processes
            assert workers.rewards([]) == []
            assert workers.rewards(answers[:3]) == direct[:3]
            assert not workers.lost


def test_an_answer_cut_off_is_worth_nothing_and_a_task_that_cannot_be_had_costs_the_sample():
    class Odd:
        def __reduce__(self):
            return int, ("x",)

    right = answer("1")
    nowhere = Problem("nowhere", 0, "?", "1")
    asked = [answer("1", truncated=True), right, answer(problem=nowhere), answer(truncated=True, problem=nowhere)]
    with RewardWorkers() as workers:
        rewards = workers.rewards([*asked, answer(problem=Problem("chain", 0, "?", "1", entry=Odd())), right])
        assert rewards[:2] == [Reward(0.0, None), Reward(1.0, None)]
        assert rewards[2].reason is not None and rewards[2].reason.startswith(
            "raised ConfigError: task is 'nowhere', but must be one of chain, add, recall, "
        )
        assert rewards[3] == Reward(0.0, None)
        assert rewards[4:] == [
            Reward(0.0, "raised ValueError: invalid literal for int() with base 10: 'x'"),
            Reward(1.0, None),
        ]
        assert workers.lost == {"raised": 2}


def test_a_function_from_a_file_sees_everything_and_uses_the_tasks_score(tmp_path, monkeypatch):
    written(tmp_path / "beside.py", "PENALTY = 0.5")
    written(
        tmp_path / "own.py",
        """
        from beside import PENALTY
        from puzzle_jax.tasks.rewards.answers import Answer

        def reward(answer: Answer, score, weight=10):
            assert (answer.problem.task, answer.problem.details["steps"]) == ("chain", 1)
            assert (answer.effort, answer.analysis) == ("low", "so")
            return weight * score() - PENALTY * answer.tokens - 100 * answer.truncated
        """,
    )
    monkeypatch.chdir(tmp_path)
    with RewardWorkers(function="own.py:reward") as workers:
        rewards = workers.rewards([answer("1"), answer("2", tokens=4), answer("1", truncated=True)])
        assert rewards == [Reward(5.0, None), Reward(-2.0, None), Reward(-105.0, None)]


def test_a_function_from_a_module_of_the_path(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    written(tmp_path / "own_package" / "rewards.py", "def short(answer, score):\n    return 1 / answer.tokens")
    monkeypatch.syspath_prepend(tmp_path)
    with RewardWorkers(function="own_package.rewards:short") as workers:
        assert workers.rewards([answer(tokens=8)]) == [Reward(0.125, None)]
    # The working directory is searched only where it is on the path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="No module named 'own_package'"):
        RewardWorkers(function="own_package.rewards:short")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with RewardWorkers(function="own_package.rewards:short") as workers:
        assert workers.rewards([answer(tokens=8)]) == [Reward(0.125, None)]


@pytest.mark.parametrize("processes", [1, 2])
def test_every_misbehaviour_costs_its_own_sample(behaviours, processes, capfd):
    ways = list(EXPECTED)
    answers = [answer(final, tokens) for tokens, way in enumerate(ways) for final in (way, "1", "2")]
    expected = [
        reward
        for tokens, way in enumerate(ways)
        for reward in (EXPECTED[way], Reward(tokens + 1.0, None), Reward(tokens + 0.0, None))
    ]
    with RewardWorkers(function=behaviours, time_limit=HANG, processes=processes) as workers:
        assert dict(enumerate(workers.rewards(answers))) == dict(enumerate(expected))
        assert workers.lost == {"raised": 7, "died": 2, "value": 8}
        (huge,) = workers.rewards([answer("huge")])
        assert huge.reward is None and huge.reason is not None and huge.reason.startswith("returned 1000")
    printed = capfd.readouterr()
    assert printed.out == "" and "a line\n" in printed.err and "from a child\n" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hang_costs_its_own_sample_and_what_it_started_ends(behaviours, processes):
    with RewardWorkers(function=behaviours, time_limit=LIMIT, processes=processes) as workers:
        rewards = workers.rewards([answer(f) for f in ("1", "hangs", "2", "hangs in C", "1", "starts another", "1")])
        right, wrong = Reward(11.0, None), Reward(10.0, None)
        assert rewards == [right, TOO_LONG, wrong, TOO_LONG, right, TOO_LONG, right]
        assert workers.lost == {"time": 3}
        child = child_started()
        wait_until(lambda: not alive(child))


def test_a_function_that_dies_takes_its_daemons_along(behaviours):
    with RewardWorkers(function=behaviours, time_limit=HANG) as workers:
        rewards = workers.rewards([answer("leaves a daemon"), answer("1")])
        assert rewards == [Reward(None, "ended its process with exit code 3"), Reward(11.0, None)]
        assert not Path(f"/proc/{child_started()}").exists()


def test_answers_are_judged_while_the_caller_does_something_else(behaviours):
    with RewardWorkers(function=behaviours, time_limit=LIMIT, processes=2) as workers:
        assert workers.finished(wait=True) == workers.finished(wait=False) == []
        asked = {workers.begin(answer(final)): final for final in ("1", "hangs", "2", "raises")}
        own = workers.begin(answer("1"), own_score=True)
        assert workers.rewards([answer("2")]) == [Reward(10.0, None)]  # which takes none of their results
        found = {}
        while len(found) < 5:
            news = workers.finished(wait=True)
            assert news
            found |= dict(news)
        assert {final: found[ticket] for ticket, final in asked.items()} == {
            "1": Reward(11.0, None),
            "hangs": TOO_LONG,
            "2": Reward(10.0, None),
            "raises": EXPECTED["raises"],
        }
        assert found[own] == Reward(1.0, None) and found[own].score == 1.0
        begun = [workers.begin(answer(str(n))) for n in range(9)]
        found = {}
        wait_until(lambda: found.update(workers.finished(wait=False)) or len(found) == 9)
        assert sorted(found) == begun


def test_a_task_s_own_score_that_is_lost_is_0_and_what_it_gave_is_known(tmp_path, monkeypatch):
    function = written(
        tmp_path / "half.py",
        """
        def reward(answer, score):
            return 0.5 * score() if answer.tokens > 1 else 0.25
        """,
    )
    with RewardWorkers(function=f"{function}:reward") as workers:
        rewards = workers.rewards([answer("1"), answer("2"), answer("1", tokens=1), answer("1", truncated=True)])
        assert [(one.reward, one.score) for one in rewards] == [(0.5, 1.0), (0.0, 0.0), (0.25, None), (0.0, 0.0)]
        missing = answer("1", problem=Problem("nowhere", 0, "?", "1"))
        (function_lost,), (own_lost,) = workers.rewards([missing]), workers.rewards([missing], own_score=True)
        assert (function_lost.reward, own_lost.reward) == (None, 0.0)
        assert function_lost.reason == own_lost.reason != None  # noqa: E711


@pytest.mark.parametrize(
    ("function", "names", "seen"),
    [(True, None, True), (True, ("MINE", "ABSENT"), True), (True, (), False), (False, None, False)],
)
def test_what_user_code_sees_of_the_environment(tmp_path, monkeypatch, function, names, seen):
    monkeypatch.setenv("MINE", "secret")
    function = function and written(
        tmp_path / "see.py", "import os\n\ndef reward(answer, score):\n    return os.environ.get('MINE') == 'secret'"
    )
    with RewardWorkers(function=f"{function}:reward" if function else None, environment=names) as workers:
        (pid,) = process_ids(workers)
        variables = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        assert (b"MINE=secret" in variables) == seen
        assert {b"PYTHONHASHSEED=0", b"JAX_PLATFORMS=cpu"} <= variables
        assert (f"PATH={os.environ['PATH']}".encode() in variables) == (names is None)
        if function:
            assert workers.rewards([answer()]) == [Reward(float(seen), None)]


def test_a_function_s_file_is_found_without_importing(tmp_path, monkeypatch):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for directory in ("outer", "outer/inner"):
        (tmp_path / directory / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "outer" / "inner" / "pay.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert reward_file("outer.inner.pay:f") == tmp_path / "outer/inner/pay.py"
    assert reward_file("outer:f") == tmp_path / "outer/__init__.py"
    assert reward_file("some/where.py:f") == Path("some/where.py")
    assert [reward_file(f"{name}:f") for name in ("outer.none", "none.such", "math.x", "sys")] == [None] * 4


def test_order_is_kept_whatever_takes_longer_and_answers_may_be_long(tmp_path):
    function = written(
        tmp_path / "slow.py",
        """
        import time

        def reward(answer, score):
            time.sleep(0.02 * (answer.tokens % 3))
            return answer.tokens + len(answer.analysis)
        """,
    )
    answers = [Answer(TASKS["chain"].sample(0), "low", "a" * (n * 200_000), "1", n, False) for n in range(20)]
    with RewardWorkers(function=f"{function}:reward", processes=2) as workers:
        assert [reward.reward for reward in workers.rewards(answers)] == [n * 200_001 for n in range(20)]


def test_processes_end_with_close_and_one_that_dies_idle_costs_nothing(behaviours):
    workers = RewardWorkers(function=behaviours, time_limit=HANG, processes=2)
    answers = [answer("1", n) for n in range(4)]
    expected = [Reward(n + 1.0, None) for n in range(4)]
    assert workers.rewards(answers) == expected
    before = process_ids(workers)
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: not alive(before[0]))
    assert workers.rewards(answers) == expected and not workers.lost
    pids = {*before, *process_ids(workers)}
    workers.close()
    workers.close()
    assert len(pids) >= 2 and not any(alive(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="the reward workers were closed"):
        workers.rewards(answers)


def test_a_parent_that_is_killed_leaves_no_process(behaviours, tmp_path):
    # No __main__ guard: processes that imported this script would start processes themselves.
    script = written(
        tmp_path / "script.py",
        f"""
        from puzzle_jax.tasks import TASKS
        from puzzle_jax.tasks.rewards.answers import Answer
        from puzzle_jax.tasks.rewards.workers import RewardWorkers

        def rewards(*finals):
            return workers.rewards([Answer(TASKS["chain"].sample(0), "low", "", final, 1, False) for final in finals])

        workers = RewardWorkers(function={behaviours!r}, time_limit={HANG}, processes=3)
        while not all(worker.ready for worker in workers._workers) or len(workers._workers) < 3:
            rewards("1", "1", "1")
        print(*(worker.process.pid for worker in workers._workers), flush=True)
        rewards("hangs", "hangs in C", "starts another")
        """,
    )
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 3
    pids.append(child_started())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not any(alive(pid) for pid in pids))


def test_an_interrupt_stops_the_call_alone(tmp_path):
    begun = tmp_path / "begun"
    reward = written(
        tmp_path / "hanging.py",
        f"""
        import pathlib, time

        def reward(answer, score):
            if answer.final == "hangs":
                pathlib.Path({str(begun)!r}).touch()
                time.sleep(10_000)
            return 2.0
        """,
    )
    script = written(
        tmp_path / "script.py",
        f"""
        from puzzle_jax.tasks import TASKS
        from puzzle_jax.tasks.rewards.answers import Answer
        from puzzle_jax.tasks.rewards.workers import RewardWorkers

        def rewards(final):
            return workers.rewards([Answer(TASKS["chain"].sample(0), "low", "", final, 1, False)] * 2)

        with RewardWorkers(function="{reward}:reward", time_limit={HANG}, processes=2) as workers:
            try:
                rewards("hangs")
            except KeyboardInterrupt:
                print([reward.reward for reward in rewards("1")], dict(workers.lost))
        """,
    )
    parent = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(begun.exists)
        os.killpg(parent.pid, signal.SIGINT)
        assert parent.communicate(timeout=HANG) == ("[2.0, 2.0] {}\n", "")
    finally:
        parent.kill()


def test_a_file_is_read_once_and_a_module_that_vanishes_is_told(tmp_path, monkeypatch):
    program = "import os\n\ndef reward(answer, score):\n    return os._exit(0) if answer.final == 'exits' else 1.0\n"
    file = written(tmp_path / "edited.py", program)
    written(tmp_path / "vanishing.py", program)
    monkeypatch.syspath_prepend(tmp_path)
    given = [answer("exits"), answer()]
    expected = [Reward(None, "ended its process with exit code 0"), Reward(1.0, None)]
    with RewardWorkers(function=f"{file}:reward") as workers:
        written(tmp_path / "edited.py", "reward = lambda answer, score: 2.0")
        assert workers.rewards(given) == expected
    with RewardWorkers(function="vanishing:reward") as workers:
        (tmp_path / "vanishing.py").unlink()
        with pytest.raises(ConfigError) as caught:
            workers.rewards(given)
    message = "reward is 'vanishing:reward', but loading vanishing raised ModuleNotFoundError: "
    assert str(caught.value) == message + "No module named 'vanishing'"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 0.0}, "time_limit is 0.0, but must be above 0"),
        ({"time_limit": -1.5}, "time_limit is -1.5, but must be above 0"),
        ({"time_limit": float("nan")}, "time_limit is nan, but must be a finite number above 0"),
        ({"time_limit": float("inf")}, "time_limit is inf, but must be a finite number above 0"),
        ({"processes": 0}, "workers is 0, but must be at least 1"),
        ({"function": "f"}, "reward is 'f', but must be path/to/file.py:name or package.module:name"),
        ({"function": "bad.py"}, "reward is 'bad.py', but must be path/to/file.py:name or package.module:name"),
        ({"function": "bad.py:"}, "reward is 'bad.py:', but must be path/to/file.py:name or package.module:name"),
        ({"function": "a/b:f"}, "reward is 'a/b:f', but must be path/to/file.py:name or package.module:name"),
        ({"function": "no.py:f"}, "reward is 'no.py:f', but no.py cannot be read: No such file or directory"),
        ({"function": "dir.py:f"}, "reward is 'dir.py:f', but dir.py cannot be read: Is a directory"),
        ({"function": "\0.py:f"}, r"reward is '\x00.py:f', but " + "\0.py cannot be read: embedded null byte"),
        ({"function": "bad.py:f"}, "reward is 'bad.py:f', but bad.py has no function f"),
        ({"function": "bad.py:x"}, "reward is 'bad.py:x', but x of bad.py is no function, but of type int"),
        (
            {"function": "bad.py:one"},
            "reward is 'bad.py:one', but one of bad.py takes (answer), and must take (answer, score)",
        ),
        (
            {"function": "syntax.py:f"},
            "reward is 'syntax.py:f', but loading syntax.py raised SyntaxError: "
            "'(' was never closed (syntax.py, line 2)",
        ),
        ({"function": "leaves.py:f"}, "reward is 'leaves.py:f', but loading leaves.py raised SystemExit: 5"),
        (
            {"function": "exits.py:f"},
            "reward is 'exits.py:f', but loading exits.py ended its process with exit code 6",
        ),
        (
            {"function": "no_such.module:f"},
            "reward is 'no_such.module:f', but loading no_such.module raised ModuleNotFoundError: "
            "No module named 'no_such'",
        ),
        ({"function": "json:f"}, "reward is 'json:f', but json has no function f"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(tmp_path, monkeypatch, settings, message):
    written(tmp_path / "bad.py", "x = 1\n\ndef one(answer):\n    return 1.0\n")
    written(tmp_path / "syntax.py", "x = 1\nf(")
    written(tmp_path / "leaves.py", "raise SystemExit(5)")
    written(tmp_path / "exits.py", "import os\nos._exit(6)")
    (tmp_path / "dir.py").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RewardWorkers(**settings)
    assert str(caught.value) == message


def test_a_function_that_takes_too_long_to_load_is_refused(tmp_path, monkeypatch):
    file = written(tmp_path / "slow.py", "import time\ntime.sleep(3600)")
    monkeypatch.setattr("puzzle_jax.tasks.rewards.workers._START_SECONDS", 0.5)
    with pytest.raises(ConfigError) as caught:
        RewardWorkers(function=f"{file}:f")
    assert str(caught.value) == f"reward is '{file}:f', but loading {file} took longer than 0.5 s"
