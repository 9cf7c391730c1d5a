"""Written traces: plain ones, and each habit by itself."""

import re

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks import EFFORTS, TASKS, Problem
from puzzle_jax.train.pretrain.habits import MOSTLY, Habits, written
from tests.support import present

CHAIN = Problem("chain", 5, "mod 7+5*3-9", "7", {"steps": 3})


def parts(analysis: str) -> list[str]:
    """Steps of an analysis, whichever separators were drawn."""
    return re.split("[,;]", analysis)


def test_without_habits_a_trace_is_its_steps_and_the_answer():
    task = TASKS["chain"]
    high, answer = written(task, CHAIN, "high", Habits(), 30)
    assert (parts(high), answer) == (["7+5=2", "*3=6", "-9=7"], "7")
    assert written(task, CHAIN, "medium", Habits(), 30) == ("+2*6-7", "7")
    every = Habits(careful=1.0, checked=1.0, slips={"high": 1.0}, mistaken={"high": 1.0}, endless=1.0)
    assert written(task, CHAIN, "low", every, 30) == ("", "7")


def test_careful_traces_repeat_steps_and_change_no_answer():
    task, habits = TASKS["chain"], Habits(careful=1.0, checked=1.0)
    high, answer = written(task, CHAIN, "high", habits, 30)
    assert (parts(high), answer) == (["7+5=2", "!7+5=2", "*3=6", "!*3=6", "-9=7", "!-9=7"], "7")
    assert written(task, CHAIN, "medium", habits, 30) == ("+2!+2*6!*6-7!-7", "7")


def test_shares_are_kept():
    slips = {"medium": 0.03, "high": 0.1}
    task, habits, count = TASKS["add"], Habits(careful=0.4, checked=0.5, slips=slips, endless=0.2), 1500
    careful, wrong, endless = dict.fromkeys(EFFORTS, 0), dict.fromkeys(EFFORTS, 0), dict.fromkeys(EFFORTS, 0)
    for problem in (Problem("add", seed, "add 4321+5678", "9999") for seed in range(count)):
        for effort in EFFORTS:
            analysis, answer = written(task, problem, effort, habits, 90)
            endless[effort] += answer is None
            if answer is not None:
                careful[effort] += "!" in analysis
                wrong[effort] += answer != problem.answer
    assert careful["low"] == wrong["low"] == endless["low"] == endless["medium"] == 0
    assert endless["high"] / count == pytest.approx(0.2, abs=0.03)
    for effort, ended in (("medium", count), ("high", count - endless["high"])):
        assert careful[effort] / ended == pytest.approx(0.4 * (1 - 0.5**4), abs=0.04)
        assert wrong[effort] / ended == pytest.approx(1 - (1 - slips[effort]) ** 4, abs=0.04)


def test_a_slip_is_one_off_and_is_gone_on_from():
    task = TASKS["chain"]
    for seed in range(20):
        problem = Problem("chain", seed, "mod 2+3", "5", {"steps": 1})
        analysis, answer = written(task, problem, "high", Habits(slips={"high": 1.0}), 30)
        assert (analysis, answer) in (("2+3=4", "4"), ("2+3=6", "6"))


def test_mistaken_kinds_of_computation_mostly_have_the_same_wrong_result():
    task, habits = TASKS["chain"], Habits(mistaken={"medium": 0.2, "high": 0.1})
    errors: dict[str, dict[str, list[int]]] = {"medium": {}, "high": {}}
    for seed in range(8000):
        first, operator, second = str(seed % 10), "+-*"[seed // 10 % 3], str(seed // 30 % 10)
        problem = Problem("chain", seed, f"mod {first}{operator}{second}", "", {"steps": 1})
        for effort, found in errors.items():
            _, answer = written(task, problem, effort, habits, 30)
            right = task.work(problem, effort).answer
            found.setdefault(operator + right, []).append((int(present(answer)) - int(right)) % 10)
    wrong = {effort: {kind for kind, of in found.items() if any(of)} for effort, found in errors.items()}
    assert wrong["high"] == {"-2", "-3"}
    assert wrong["medium"] == wrong["high"] | {"+0", "+2", "-4", "*8"}  # of the 30 kinds
    for effort, found in errors.items():
        of_kinds = [found[kind] for kind in wrong[effort]]
        assert all(set(of) in ({0, 1}, {0, 9}) for of in of_kinds)  # one too high, or one too low
        shares = [sum(map(bool, of)) / len(of) for of in of_kinds]
        assert sum(shares) / len(shares) == pytest.approx(MOSTLY, abs=0.05)


def test_an_endless_trace_repeats_one_check():
    analysis, answer = written(TASKS["chain"], CHAIN, "high", Habits(endless=1.0), 200)
    steps = parts(analysis)
    plain = [step for step in steps if not step.startswith("!")]
    assert answer is None and len(analysis) >= 200
    assert plain == ["7+5=2", "*3=6", "-9=7"][: len(plain)]
    assert set(steps[len(plain) :]) == {"!" + plain[-1]}


def test_impossible_shares_are_refused():
    with pytest.raises(ConfigError, match=r"habits.slips.high is 1\.5, but must be from 0 to 1"):
        Habits(slips={"high": 1.5})
    with pytest.raises(ConfigError, match=r"effort is 'highest', but must be one of low, medium, high"):
        Habits(slips={"highest": 0.5})
    with pytest.raises(ConfigError, match=r"habits.endless is -0\.5, but must be from 0 to 1"):
        Habits(endless=-0.5)
