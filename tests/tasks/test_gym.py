"""reasoning-gym families: problems depend on the seed alone, scores lie between 0 and 1, and what is refused.

Families that are slow to draw are checked in the slow run.
"""

import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.accuracy import SPLITS, QuestionSet
from puzzle_jax.tasks import FiniteTask, Problem, WorkedTask, get_task, gym_families, problems
from puzzle_jax.tasks.gym import GymTask, _alone

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs the package reasoning-gym (extra `reasoning-gym`)"
)

# One of each kind: its own scorer, partial credit, an answer in the metadata, no answer, eval, sympy, the library's
# default scorer, global random state, numpy's random state, an extra condition from puzzle_jax.
FAMILIES = (
    "basic_arithmetic", "binary_matrix", "boxnet", "coin_flip", "countdown", "game_of_life_halting", "graph_color",
    "list_functions", "pool_matrix", "prime_factorization", "puzzle24", "rubiks_cube", "simple_equations", "sudoku",
)  # fmt: skip
WITHOUT_ANSWER = {"boxnet", "rush_hour"}
GARBAGE = (
    "", " \n", "garbage", "[1, 2", "\x00", "\ud800", "nan", "-inf", "1e999", "9" * 9000, "[" * 5000, "{}", "null",
    "[[1]]", '{"a": 1}', "{1, 2}", "1/0", "a = b", "½", "x^2", "9**9**9", "1e999999999", "U99999999", "A+99999999",
    "- 1\n- 2",
)  # fmt: skip


def gym(family: str) -> GymTask:
    task = get_task(f"reasoning-gym:{family}")
    assert isinstance(task, GymTask)
    return task


def check_family(family: str, seeds: range) -> None:
    task = gym(family)
    drawn = [task.sample(seed) for seed in seeds]
    assert drawn == [task.sample(seed) for seed in seeds]
    assert len({problem.prompt for problem in drawn}) == len(drawn)
    for problem in drawn:
        assert (problem.task, problem.prompt.strip() != "") == (f"reasoning-gym:{family}", True)
        copy = pickle.loads(pickle.dumps(problem))
        assert copy == problem
        if family in WITHOUT_ANSWER:
            assert problem.answer == ""
        else:
            assert task.score(copy, problem.answer) == task.score(copy, f" {problem.answer}\n") == 1.0
    for text in GARBAGE:
        if text.strip() != drawn[0].answer:
            assert 0.0 <= task.score(drawn[0], text) < 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_problems_follow_from_the_seed_and_their_answers_are_right(family):
    check_family(family, range(3))


@pytest.mark.slow
def test_every_family_does():
    assert len(gym_families()) == 105
    for family in gym_families():
        check_family(family, range(2))


def test_families_are_endless_and_no_pretraining_split_applies():
    task = gym("basic_arithmetic")
    assert not isinstance(task, WorkedTask | FiniteTask)
    ahead = problems(task, first_seed=5)
    assert [next(ahead).seed for _ in range(40)] == list(range(5, 45))
    sets = [QuestionSet((task.name,), ("low",), 4, split).questions() for split in SPLITS]
    assert len({problem.seed for asked in sets for problem, _ in asked}) == 4 * len(SPLITS)


def test_the_global_generators_go_on_as_if_nothing_was_drawn():
    # Not through a task: runtime type checks of lists in tests also draw from `random`.
    random.seed(3)
    np.random.seed(3)
    expected = random.random(), np.random.random()
    random.seed(3)
    np.random.seed(3)
    inside = []
    for _ in range(2):
        with _alone(7):
            inside.append((random.random(), np.random.random()))
    assert inside[0] == inside[1] != expected
    assert (random.random(), np.random.random()) == expected


def test_families_that_follow_hash_order_are_drawn_in_a_fixed_order():
    program = "from puzzle_jax.tasks import get_task; print(get_task('reasoning-gym:ransom_note').sample(17).prompt)"
    env = {**os.environ, "PYTHONHASHSEED": "1234"}
    there = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    task = gym("ransom_note")
    problem = task.sample(17)
    assert there == problem.prompt + "\n"
    assert task.score(problem, problem.answer) == 1.0
    assert task.sample(18).prompt != problem.prompt


@pytest.mark.slow
def test_every_family_draws_alike_in_every_process():
    program = (
        "import json, sys; from puzzle_jax.tasks import get_task, gym_families\n"
        "names = gym_families()[:: int(sys.argv[1])]\n"
        "ask = lambda name: map(get_task(f'reasoning-gym:{name}').sample, range(3))\n"
        "drawn = {name: [(p.prompt, p.answer) for p in ask(name)] for name in names}\n"
        "sys.stdout.write(json.dumps(drawn))"
    )
    runs = []
    for hash_seed, order in (("1", "1"), ("2", "-1")):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program, order], env=env, capture_output=True, text=True, check=True
        )
        runs.append(json.loads(done.stdout))
    assert runs[0] == runs[1]


def test_partial_credit_is_the_familys_own():
    problem = gym("prime_factorization").sample(0)
    number = problem.entry["metadata"]["number"]
    assert gym("prime_factorization").score(problem, str(number)) == 0.5
    assert gym("prime_factorization").score(problem, "2 × 2 × 2 × 2 × 2 × 2 × 2 × 2 × 2 × 2") == 0.01


def test_scorers_that_give_full_marks_to_wrong_answers_are_held_to_a_condition():
    halting = gym("game_of_life_halting")
    problem = halting.sample(1)
    assert problem.answer == "False"
    assert [halting.score(problem, text) for text in ("False", "false", "True", "maybe")] == [1.0, 1.0, 0.0, 0.0]

    coins = gym("coin_flip")
    problem = coins.sample(1)
    assert problem.answer == "0.3125"
    assert [coins.score(problem, text) for text in ("5/16", "0.31250001", "0", "0.3", "3")] == [1.0, 1.0, 0.0, 0.0, 0.0]

    cards = gym("puzzle24")
    problem = cards.sample(0)
    assert problem.entry["metadata"]["numbers"] == [1, 3, 5, 9]
    assert [cards.score(problem, text) for text in ("3*5 + 9*1", "4*8 - 6 - 2", "1 + 3 + 5 + 9", "24")] == [
        1.0,
        0,
        0,
        0,
    ]
    halves = Problem(cards.name, 0, "", "", entry={**problem.entry, "metadata": {"numbers": [7, 7, 3, 1]}})
    assert cards.score(halves, "7*7/(3 - 1)") == 0.0


@pytest.mark.parametrize("family", ["spiral_matrix", "string_insertion", "puzzle24", "countdown", "simple_integration"])
def test_no_answer_is_run_as_a_program(family, tmp_path):
    task, target = gym(family), tmp_path / "made"
    assert task.score(task.sample(0), f"open({str(target)!r}, 'w').write('x')") == 0.0
    assert task.score(task.sample(0), f"[__import__('pathlib').Path({str(target)!r}).touch()]") == 0.0
    assert not target.exists()


def test_a_scorer_that_fails_on_the_right_answer_too_is_a_bug():
    task = gym("prime_factorization")
    problem = task.sample(0)
    assert task.score(problem, "two × three") == 0.0  # int("two") raises inside the library
    broken = Problem(task.name, 0, problem.prompt, problem.answer, entry={"metadata": {}})
    with pytest.raises(KeyError, match="answer"):
        task.score(broken, "two × three")


def test_unknown_families_name_close_ones():
    with pytest.raises(ConfigError, match=r"no family 'sudokus'; did you mean sudoku or mini_sudoku"):
        get_task("reasoning-gym:sudokus")
    with pytest.raises(ConfigError, match="no family 'qqqq'; it has 106, from ab to zebra_puzzles"):
        get_task("reasoning-gym:qqqq")
    with pytest.raises(ConfigError, match="composite mixes other families"):
        get_task("reasoning-gym:composite")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"need the package reasoning-gym, which is not installed; pip install reasoning-gym installs it"
    with pytest.raises(ConfigError, match=message):
        get_task("reasoning-gym:sudoku")
