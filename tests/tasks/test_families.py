"""The embedded families: exact prompts, traces and answers, and the split into training and held-out problems."""

import pickle
import re

import pytest

from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.tasks import (
    DISTANCE_BUCKETS,
    EFFORTS,
    TASKS,
    FiniteTask,
    Problem,
    Work,
    WorkedTask,
    get_task,
    is_held_out,
    problems,
    worked_task,
)
from puzzle_jax.tasks.arithmetic import Add, Chain
from puzzle_jax.tasks.ledger import Ledger
from puzzle_jax.tasks.recall import Recall

FAMILIES = [*TASKS, "ledger"]


def test_tasks_are_found_by_name_and_unknown_ones_refused():
    assert list(TASKS) == ["chain", "add", "recall"]
    assert get_task("add") is TASKS["add"]
    assert all(isinstance(task, WorkedTask) for task in TASKS.values())
    assert not any(isinstance(task, FiniteTask) for task in TASKS.values())
    with pytest.raises(
        PuzzleError, match=r"task is 'sums', but must be one of chain, add, recall, ledger, reasoning-gym:<family>"
    ):
        get_task("sums")


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_seeds_give_equal_problems(name):
    task = get_task(name)
    drawn = [task.sample(seed) for seed in range(50)]
    assert drawn == [task.sample(seed) for seed in range(50)]
    assert len({problem.prompt for problem in drawn}) > 40
    assert [problem.seed for problem in drawn] == list(range(50))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_answer_scores(name):
    task = get_task(name)
    problem = task.sample(3)
    assert task.score(problem, problem.answer) == 1.0
    assert task.score(problem, f" {problem.answer}\n") == 1.0
    for wrong in ("", "x", problem.answer + "0", str((int(problem.answer) + 1) % 10)):
        assert task.score(problem, wrong) == 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_work_grows_with_effort_and_ends_in_the_answer(name):
    task = get_task(name)
    assert isinstance(task, WorkedTask)
    for seed in range(60):
        problem = task.sample(seed)
        low, medium, high = (task.work(problem, effort) for effort in EFFORTS)
        assert low.answer == medium.answer == high.answer == problem.answer
        assert low.steps == ()
        assert len(medium.steps) == len(high.steps) > 0
        assert 0 < len("".join(medium.steps)) < len("".join(high.steps))
    with pytest.raises(PuzzleError, match="effort is 'max', but must be one of low, medium, high"):
        task.work(task.sample(0), "max")


def test_chain_is_worked_from_left_to_right_modulo_ten():
    problem = Problem("chain", 5, "mod 7+5*3-9", "7", {"steps": 3})
    task = Chain()
    assert task.work(problem, "high") == Work(("7+5=2", "*3=6", "-9=7"), "7")
    assert task.work(problem, "medium") == Work(("+2", "*6", "-7"), "7", separated=False)
    assert task.work(problem, "high", lambda _, result: result + 1) == Work(("7+5=3", "*3=0", "-9=2"), "2")
    assert task.work(problem, "low", lambda _, result: result + 1) == Work((), "7")


def test_chain_answers_agree_with_python():
    for seed in range(200):
        problem = Chain(max_steps=7).sample(seed)
        first, *rest = re.findall(r"[+*-]?\d", problem.prompt.removeprefix("mod "))
        value = int(first)
        for step in rest:
            value = eval(f"({value}){step}") % 10
        assert problem.answer == str(value)
        assert problem.details["steps"] == len(rest) <= 7


def test_addition_writes_digits_carries_and_sums():
    problem = Problem("add", 5, "add 345+678", "1023", {"digits": 3, "carries": 3})
    task = Add()
    assert task.work(problem, "high") == Work(("5+8+0=13", "4+7+1=12", "3+6+1=10"), "1023")
    assert task.work(problem, "medium") == Work(("583", "472", "360"), "1023")
    lower = task.work(problem, "high", lambda _, result: result - 4)
    assert lower == Work(("5+8+0=9", "4+7+0=7", "3+6+0=5"), "579")
    assert task.work(problem, "medium", lambda _, result: result + 9).steps == ("589", "479", "369")  # 19 is the most


def test_addition_answers_and_carries():
    for seed in range(200):
        problem = Add(min_digits=2, max_digits=5).sample(seed)
        first, second = map(int, re.findall(r"\d+", problem.prompt))
        assert problem.answer == str(first + second)
        assert len(str(first)) == len(str(second)) == problem.details["digits"]
        assert 2 <= problem.details["digits"] <= 5
        assert 9 * problem.details["carries"] == sum(map(int, f"{first}{second}")) - sum(map(int, problem.answer))


def test_recall_work_copies_entries():
    problem = Problem("recall", 5, "A7 ko B2 demu Q5 ?QA", "2", {"asked": 2, "entries": 3, "distance": 20})
    task = Recall()
    assert task.work(problem, "high") == Work(("Q5=5", "A7=2"), "2")
    assert task.work(problem, "medium") == Work(("Q5", "A2"), "2", separated=False)
    assert task.work(problem, "high", lambda _, result: result + 1) == Work(("Q5=6", "A7=4"), "4")
    assert task.work(problem, "medium", lambda _, result: result + 1) == Work(("Q6", "A4"), "4", separated=False)


def test_recall_answers_and_distances():
    buckets = {label: 0 for label, *_ in DISTANCE_BUCKETS}
    longest = 0
    for seed in range(600):
        problem = Recall().sample(seed)
        text, asked = problem.prompt.split("?")
        entries = dict(re.findall(r"([A-Z])(\d)", text))
        assert problem.details["entries"] == len(entries) == len(re.findall("[A-Z]", text))
        assert problem.answer == str(sum(int(entries[key]) for key in asked) % 10)
        assert problem.details["asked"] == len(set(asked)) == len(asked)
        distance = problem.details["distance"]
        assert distance == max(problem.prompt.index("?") - problem.prompt.index(key) for key in asked)
        for label, least, greatest in DISTANCE_BUCKETS:
            buckets[label] += least <= distance <= greatest
        longest = max(longest, len(problem.prompt))
    assert sum(buckets.values()) == 600
    assert min(buckets.values()) > 60
    assert 340 < longest <= 360


def test_ledger_work_copies_changes_in_order():
    prompt = "A1+3 ko B1+2 A2-4 demu A3+9 B2-5 ?A2"
    problem, task = Problem("ledger", 5, prompt, "9", {"changes": 2, "distance": 34}), Ledger()
    assert task.work(problem, "high") == Work(("A1+3=3", "A2-4=9"), "9")
    assert task.work(problem, "medium") == Work(("1=3", "2=9"), "9")
    assert task.work(problem, "high", lambda _, result: result + 1) == Work(("A1+3=4", "A2-4=1"), "1")


def test_ledger_answers_and_distances():
    longest, beyond, changes = 0, 0, set()
    for seed in range(600):
        problem = Ledger().sample(seed)
        text, asked = problem.prompt.split("?")
        entries = re.findall(r"([A-Z])([1-9])([-+][0-9])", text)
        assert len(entries) == len(re.findall("[A-Z]", text))
        for account in {account for account, *_ in entries}:
            numbers = [int(number) for of, number, _ in entries if of == account]
            assert numbers == list(range(1, len(numbers) + 1))
        own = [int(change) for account, number, change in entries if account == asked[0] and number <= asked[1]]
        assert problem.answer == str(sum(own) % 10)
        assert problem.details == {"changes": len(own), "distance": len(text) - text.index(f"{asked[0]}1")}
        longest, beyond = max(longest, len(problem.prompt)), beyond + (problem.details["distance"] > 256)
        changes.add(len(own))
    assert changes == set(range(1, 10))
    assert 780 < longest <= 803 and beyond > 60


@pytest.mark.parametrize(
    "prompt,task,computed",
    [
        ("mod 7+5*3-9", "chain", {"7+5": 12, "2*3": 6, "6-9": -3}),
        ("add 345+678", "add", {"5+8+0": 13, "4+7+1": 12, "3+6+1": 10}),
        ("A7 ko B2 demu Q5 ?QA", "recall", {"0+5": 5, "5+7": 12}),
        ("A1+3 ko B1+2 A2-4 ?A2", "ledger", {"0+3": 3, "3-4": 9}),
    ],
)
@pytest.mark.parametrize("effort", ["medium", "high"])
def test_a_slip_is_told_what_a_step_computes(prompt, task, computed, effort):
    seen = {}

    def slip(what, result):
        seen[what] = result
        return result

    worked_task(task).work(Problem(task, 5, prompt, ""), effort, slip)
    assert {what: result % 10 for what, result in seen.items()} == {w: r % 10 for w, r in computed.items()}


def test_splits_share_no_prompt_and_cover_all():
    task = get_task("chain")
    inside, outside = problems(task, held_out=True), problems(task, held_out=False)
    held_out = {next(inside).prompt for _ in range(100)}
    rest = {next(outside).prompt for _ in range(800)}
    assert not held_out & rest
    share = sum(is_held_out(task.sample(seed)) for seed in range(2000)) / 2000
    assert 0.09 < share < 0.16
    with pytest.raises(PuzzleError, match="first_seed is -1, but must be at least 0"):
        next(problems(task, first_seed=-1))


def test_problems_are_immutable_and_can_be_pickled():
    problem = get_task("add").sample(9)
    with pytest.raises(TypeError):
        problem.details["digits"] = 1  # pyright: ignore[reportIndexIssue]
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_impossible_difficulties_are_refused():
    with pytest.raises(ConfigError, match="chain: steps range is 4 to 3, but must satisfy 1 <= lowest <= highest"):
        Chain(min_steps=4, max_steps=3)
    with pytest.raises(ConfigError, match="add: digits range is 0 to 3"):
        Add(min_digits=0, max_digits=3)
    with pytest.raises(ConfigError, match="recall: max_asked is 27, but must be from 1 to 26"):
        Recall(max_asked=27)
    with pytest.raises(ConfigError, match="recall: max_length is 8, but must be at least 32"):
        Recall(max_length=8)
