"""The package reads the examples in docs/files.md."""

import json
import re

from puzzle_jax.generate.traces import COLUMNS, read_traces
from puzzle_jax.tasks import get_task, problems
from puzzle_jax.tasks.chat.embedded import embedded_chat
from puzzle_jax.tasks.matches import MATCHES
from puzzle_jax.tasks.rewards.answers import Answer
from puzzle_jax.tasks.rewards.worker_program import load
from tests.paths import ROOT

TEXT = (ROOT / "docs" / "files.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
PROBLEMS, TEXT_TRACES, TOKEN_TRACES = (content for kind, content in BLOCKS if kind == "jsonl")


def test_rows_of_problems_are_judged_as_the_page_says(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(PROBLEMS)
    task = get_task(str(path))
    asked = list(problems(task))
    assert [problem.entry for problem in asked] == ["exact", "contains", "last_number", "math", "last_number"]
    right = ["42.0", "It is Paris.", "12 coins", "The answer is 0.5", "The table is 1.5 m, or 150 cm, long."]
    assert [task.score(problem, text) for problem, text in zip(asked, right, strict=True)] == [1.0] * 5
    assert all(f"| `{match}` |" in TEXT for match in MATCHES)


def test_rows_of_traces_are_read(tmp_path):
    path = tmp_path / "traces.jsonl"
    path.write_text(TEXT_TRACES)
    first, second, third = read_traces(path, embedded_chat())
    assert first.completion == second.completion and (first.effort, second.effort) == ("medium", "low")
    assert embedded_chat().parse(third.completion).final == "4"
    path.write_text(TOKEN_TRACES)
    (trace,) = read_traces(path)
    assert (trace.prompt, trace.completion, trace.reward) == ((1, 2, 3), (4, 5), 1.0)
    assert set(json.loads(TOKEN_TRACES)) <= set(COLUMNS) and all(f"`{name}`" in TEXT for name in COLUMNS)


def test_the_reward_function_pays():
    (source,) = (content for kind, content in BLOCKS if kind == "python")
    reward = load("example.py:reward", source.encode())
    problem = get_task("chain").sample(0)
    assert reward(Answer(problem, "low", "", problem.answer, 100, False), lambda: 1.0) == 0.99
