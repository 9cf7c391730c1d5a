"""Written traces: plain ones, and each habit by itself."""

import re

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks import EFFORTS, TASKS, Problem
from puzzle_jax.train.pretrain.habits import Habits, written

CHAIN = Problem("chain", 5, "mod 7+5*3-9", "7", {"steps": 3})


def parts(analysis: str) -> list[str]:
    """Steps of an analysis, whatever separator each drew."""
    return re.split("[,;]", analysis)


def test_without_habits_a_trace_is_its_steps_and_the_answer():
    task = TASKS["chain"]
    high, answer = written(task, CHAIN, "high", Habits(), 30)
    assert (parts(high), answer) == (["7+5=2", "*3=6", "-9=7"], "7")
    assert written(task, CHAIN, "medium", Habits(), 30) == ("+2*6-7", "7")
    assert written(task, CHAIN, "low", Habits(1.0, 1.0, 1.0, 1.0), 30) == ("", "7")


def test_careful_traces_repeat_steps_and_change_no_answer():
    task, habits = TASKS["chain"], Habits(careful=1.0, checked=1.0)
    high, answer = written(task, CHAIN, "high", habits, 30)
    assert (parts(high), answer) == (["7+5=2", "!7+5=2", "*3=6", "!*3=6", "-9=7", "!-9=7"], "7")
    assert written(task, CHAIN, "medium", habits, 30) == ("+2!+2*6!*6-7!-7", "7")


def test_shares_are_kept():
    task, habits, count = TASKS["add"], Habits(careful=0.4, checked=0.5, slips=0.1, endless=0.2), 1500
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
        assert wrong[effort] / ended == pytest.approx(1 - 0.9**4, abs=0.04)


def test_a_slip_is_one_off_and_is_gone_on_from():
    task = TASKS["chain"]
    for seed in range(20):
        problem = Problem("chain", seed, "mod 2+3", "5", {"steps": 1})
        analysis, answer = written(task, problem, "high", Habits(slips=1.0), 30)
        assert (analysis, answer) in (("2+3=4", "4"), ("2+3=6", "6"))


def test_an_endless_trace_repeats_one_check():
    analysis, answer = written(TASKS["chain"], CHAIN, "high", Habits(endless=1.0), 200)
    steps = parts(analysis)
    plain = [step for step in steps if not step.startswith("!")]
    assert answer is None and len(analysis) >= 200
    assert plain == ["7+5=2", "*3=6", "-9=7"][: len(plain)]
    assert set(steps[len(plain) :]) == {"!" + plain[-1]}


def test_shares_beyond_one_are_refused():
    with pytest.raises(ConfigError, match=r"habits.slips is 1\.5, but must be from 0 to 1"):
        Habits(slips=1.5)
