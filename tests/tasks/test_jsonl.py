"""Prompts from a user's file: every row once, disjoint splits, what counts as correct, and what is refused."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.accuracy import DISJOINT_SPLITS, QuestionSet
from puzzle_jax.tasks import FiniteTask, JsonlTask, Problem, WorkedTask, get_task, problems
from puzzle_jax.tasks.matches import MATCHES


def written(path, rows) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "mine.jsonl", [{"prompt": f"{n} + {n}?", "answer": str(2 * n)} for n in range(40)])


def test_every_row_is_a_problem_and_the_last_one_ends_them(file):
    task = get_task(file)
    assert isinstance(task, FiniteTask) and not isinstance(task, WorkedTask)
    drawn = list(problems(task))
    assert [(p.seed, p.prompt, p.answer) for p in drawn] == [(n, f"{n} + {n}?", str(2 * n)) for n in range(40)]
    assert [p.seed for p in problems(task, first_seed=38)] == [38, 39]
    assert pickle.loads(pickle.dumps(drawn[3])) == drawn[3] == task.sample(3)
    assert {p.task for p in drawn} == {file}
    with pytest.raises(ConfigError, match="seed is 40, but must be a row from 0 to 39"):
        task.sample(40)


def test_questions_and_matches_are_read(tmp_path):
    rows = ["", {"question": "A prime?", "answer": "7", "match": "contains"}, "", {"prompt": "1?", "answer": "1"}]
    task = JsonlTask.load(written(tmp_path / "a.jsonl", rows))
    assert [(row.prompt, row.answer, row.match) for row in task.rows] == [
        ("A prime?", "7", "contains"),
        ("1?", "1", "exact"),
    ]


@pytest.mark.parametrize(
    ("match", "answer", "text", "score"),
    [
        ("exact", "Paris", " Paris\n", 1.0),
        ("exact", "Paris", "paris", 0.0),
        ("exact", "Paris", "It is Paris", 0.0),
        ("exact", "1000", "1,000", 1.0),
        ("exact", "1,000", "1000.0", 1.0),
        ("exact", "1e3", "+1000", 1.0),
        ("exact", ".5", "0.50", 1.0),
        ("exact", "1000", "10,00", 0.0),
        ("exact", "0.1", "0.10000000000000001", 0.0),
        ("exact", "1", "e1", 0.0),
        ("exact", "1", "", 0.0),
        ("exact", "nan", "NaN", 0.0),
        ("contains", "7", "The answer is 7.", 1.0),
        ("contains", "7", "eight", 0.0),
    ],
)
def test_what_counts_as_right(match, answer, text, score):
    task = JsonlTask("x.jsonl", ())
    assert task.score(Problem("x.jsonl", 0, "?", answer, entry=match), text) == score


def test_solutions_stand_for_their_results(tmp_path):
    solution = "3 pens cost 3 * 4 = <<3*4=12>>12 coins.\n#### 12"
    rows = [
        {"question": "a?", "answer": solution},
        {"question": "b?", "answer": "#### $1,200\n"},
        {"question": "c?", "answer": "So it is $\\boxed{\\frac{1}{2}}$."},
        {"question": "d?", "answer": solution, "match": "number"},
        {"question": "e?", "answer": "\\boxed{4}", "match": "exact"},
        {"question": "f?", "answer": "#### Heading"},
    ]
    task = get_task(written(tmp_path / "a.jsonl", rows))
    assert [(p.answer, p.entry) for p in problems(task)] == [
        ("12", "last_number"),
        ("$1,200", "last_number"),
        ("\\frac{1}{2}", "math"),
        ("12", "number"),
        ("\\boxed{4}", "exact"),
        ("#### Heading", "exact"),
    ]
    right = ["So 12.", "1200", "0.5", "12", "\\boxed{4}", "#### Heading"]
    assert [task.score(p, text) for p, text in zip(problems(task), right, strict=True)] == [1.0] * 6


def test_a_file_is_known_by_what_it_asks_and_how_it_judges(tmp_path):
    def identity(name="a.jsonl", **row):
        return get_task(written(tmp_path / name, [{"prompt": "1?", "answer": "1", **row}])).identity

    assert identity() == identity("b.jsonl") == identity(match="exact")
    assert len({identity(), identity(match="contains"), identity(answer="2"), identity(prompt="2?")}) == 4


def test_problems_know_their_line(tmp_path):
    task = get_task(written(tmp_path / "a.jsonl", ["", {"prompt": "1?", "answer": "1"}]))
    assert task.sample(0).where == f"{task.name}, line 2"
    assert pickle.loads(pickle.dumps(task.sample(0))).where == f"{task.name}, line 2"
    assert get_task("chain").sample(3).where == "task chain, problem 3"


@given(st.integers(-(10**20), 10**20))
def test_a_number_is_right_however_its_thousands_are_grouped(number):
    task = JsonlTask("x.jsonl", ())
    problem = Problem("x.jsonl", 0, "?", str(number), entry="exact")
    assert task.score(problem, f"{number:,}") == task.score(problem, f"{number}.00") == 1.0
    assert task.score(problem, f"{number + 1:,}") == 0.0


@given(st.text())
def test_any_text_has_a_score(text):
    task = JsonlTask("x.jsonl", ())
    for match in MATCHES:
        assert task.score(Problem("x.jsonl", 0, "?", "12", entry=match), text) in (0.0, 1.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 cannot be read as JSON"),
        ("[1]", "line 2 holds a list, but must hold an object"),
        ({"answer": "1"}, "line 2 has no field prompt"),
        ({"prompt": "1?"}, "line 2 has no field answer"),
        ({"prompt": "1?", "answer": 1}, "line 2: answer is 1, but must be a text"),
        ({"prompt": " ", "answer": "1"}, "line 2: prompt is ' ', but must be a text that is not empty"),
        ({"prompt": "\ud800", "answer": "1"}, "line 2 holds half a surrogate pair"),
        ({"prompt": "a", "question": "b", "answer": "1"}, "line 2 has both prompt and question"),
        (
            {"prompt": "a", "answer": "1", "match": "regex"},
            "line 2: match is 'regex', but must be one of exact, contains",
        ),
        ({"prompt": "a", "answer": "1", "match": []}, "line 2: match is \\[\\], but must be one of exact, contains"),
        ({"prompt": "a", "answer": "1", "match": None}, "line 2: match is None, but must be one of exact, contains"),
        (
            '{"prompt": "a", "answer": "1", "n": 1' + "0" * 5000 + "}",
            "line 2 holds a whole number of thousands of digits",
        ),
        ("[" * 100_000, "line 2 is nested too deeply"),
        (
            {"prompt": "a", "answer": "2 * 2 = 4\n#### 4", "match": "exact"},
            "line 2: match is 'exact', but the answer is a solution that ends in '#### 4', which final texts do not "
            "repeat; leave match out to compare with '4' by 'last_number', or shorten it",
        ),
        (
            {"prompt": "a", "answer": "It is $\\boxed{4}$.", "match": "contains"},
            "line 2: match is 'contains', but the answer is a solution that ends in .* compare with '4' by 'math'",
        ),
        (
            {"prompt": "a", "answer": "Paris", "match": "number"},
            "line 2: match is 'number', but the answer is 'Paris', which is no number",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = written(tmp_path / "bad.jsonl", [{"prompt": "1?", "answer": "1"}, line])
    with pytest.raises(ConfigError, match=f"bad.jsonl, {message}"):
        get_task(path)


def test_files_without_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read: No such file"):
        get_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match=r"empty\.jsonl holds no row"):
        get_task(written(tmp_path / "empty.jsonl", [""]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9", "answer": "1"}')
    with pytest.raises(ConfigError, match=r"latin\.jsonl is not valid UTF-8"):
        get_task(str(tmp_path / "latin.jsonl"))


def asked(file, split, per_task=1000, seed=0) -> list[int]:
    return [p.seed for p, _ in QuestionSet((file,), ("low",), per_task, split, seed).questions()]


def test_evaluation_asks_all_rows_there_are(file):
    assert asked(file, "evaluation") == list(range(40))
    assert asked(file, "evaluation", seed=7) == list(range(40))
    some = asked(file, "evaluation", per_task=9)
    assert len(some) == 9 and some == sorted(some) == asked(file, "evaluation", per_task=9)
    assert some != asked(file, "evaluation", per_task=9, seed=1)


def test_splits_of_search_and_training_share_no_row_whatever_the_seeds(file):
    whole = [asked(file, split, seed=index) for index, split in enumerate(DISJOINT_SPLITS)]
    assert sorted(row for rows in whole for row in rows) == list(range(40))
    assert all(rows for rows in whole)
    for rows, split in zip(whole, DISJOINT_SPLITS, strict=True):
        assert set(asked(file, split, per_task=2, seed=5)) <= set(rows)


def test_equal_prompts_are_dealt_to_one_split(tmp_path):
    file = written(tmp_path / "twice.jsonl", [{"prompt": "1?", "answer": "1"}] * 6)
    taken = []
    for split in DISJOINT_SPLITS:
        try:
            taken.append(asked(file, split))
        except ConfigError as error:
            assert f"split {split!r} gets none of the 6 problems of {file}" in str(error)
    assert taken == [[0, 1, 2, 3, 4, 5]]
