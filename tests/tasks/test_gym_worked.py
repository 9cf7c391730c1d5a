"""Worked solutions of reasoning-gym's families: the library's own problems, and steps that lead to its answers."""

import importlib.util

import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.tasks import EFFORTS, Problem, Work, is_held_out, problems, worked_task
from puzzle_jax.tasks.gym import GymTask, draw
from puzzle_jax.tasks.gym_worked import WORKED_GYM, WorkedGymTask

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the package reasoning-gym (extra `reasoning-gym`)"
)
SEEDS = (0, 1, 7, 500, 2**47)


def problem(family: str, **metadata: object) -> Problem:
    return Problem(f"reasoning-gym:{family}", 5, "", "", entry={"metadata": metadata})


@pytest.mark.parametrize("family", WORKED_GYM)
def test_problems_are_the_librarys(family):
    task = worked_task(f"reasoning-gym:{family}")
    for seed in SEEDS:
        drawn, theirs = task.sample(seed), draw(family, seed)
        assert (drawn.prompt, drawn.answer) == (theirs["question"], theirs["answer"])
        assert task.score(drawn, drawn.answer) == 1.0 > task.score(drawn, f"x{drawn.answer}")


@pytest.mark.parametrize("family", WORKED_GYM)
def test_work_leads_to_the_librarys_answer(family):
    task = worked_task(f"reasoning-gym:{family}")
    for seed in range(40):
        drawn = task.sample(seed)
        low, medium, high = (task.work(drawn, effort) for effort in EFFORTS)
        assert low.answer == medium.answer == high.answer == drawn.answer
        assert low.steps == () and len(medium.steps) == len(high.steps) == drawn.details[task.level]
        assert len("".join(medium.steps)) < len("".join(high.steps))
    with pytest.raises(ConfigError, match="effort is 'max', but must be one of low, medium, high"):
        task.work(task.sample(0), "max")


@pytest.mark.parametrize("family", WORKED_GYM)
def test_only_problems_that_pretraining_never_saw_are_drawn(family):
    task = worked_task(f"reasoning-gym:{family}")
    drawn = problems(task)
    assert all(is_held_out(next(drawn)) for _ in range(20))
    assert task.identity == f"{GymTask(family).identity}, problems held out from pretraining"


def test_steps_of_each_family():
    letters, spelling = (WorkedGymTask(family) for family in WORKED_GYM)
    words = problem("letter_counting", target_letter="e", span=["Be", "red", "Ere", "so"])
    assert letters.work(words, "high") == Work(("Be1", "re2d", "E3re4", "so"), "4")
    assert letters.work(words, "medium") == Work(("B1", "r2", "E4", "s4"), "4")
    assert letters.work(words, "medium", lambda _, result: result - 1) == Work(("B0", "r0", "E0", "s0"), "0")
    computed = {}
    slipped = letters.work(words, "high", lambda what, result: computed.setdefault(what, result) and result + 1)
    assert slipped == Work(("Be2", "re4d", "E6re8", "so"), "8")
    assert computed == {"0+1": 1, "2+1": 3, "4+1": 5, "6+1": 7}
    word = problem("spell_backward", word="kreng")
    assert spelling.work(word, "high") == Work(("1k", "2r", "3e", "4n", "5g"), "gnerk")
    assert spelling.work(word, "medium", lambda _, result: result + 1) == Work(("k", "r", "e", "n", "g"), "gnerk")


def test_families_without_worked_solutions_are_refused():
    with pytest.raises(ConfigError, match="task reasoning-gym:sudoku has no worked solutions; these have: chain, add"):
        worked_task("reasoning-gym:sudoku")
    with pytest.raises(ConfigError, match="reasoning-gym:sudoku has no worked solutions; letter_counting, spell_"):
        WorkedGymTask("sudoku")
