"""The choice of prompts: weights, pass rates, rows of files, and resuming from another stream's state."""

import json
from collections import Counter

import pytest

from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.tasks import TASKS, is_held_out
from puzzle_jax.train.grpo.prompts import Prompts, PromptSettings
from tests.support import present


def settings(**changes):
    return PromptSettings(**{"tasks": {"chain": 1.0}, "efforts": {"high": 1.0}, **changes})


def level(prompt):
    return next(iter(prompt.problem.details.values()))


def test_weights_of_tasks_and_efforts_multiply():
    stream = Prompts(settings(tasks={"chain": 3.0, "add": 1.0}, efforts={"low": 1.0, "high": 4.0}))
    counts = Counter((prompt.problem.task, prompt.effort) for prompt in stream.draw(4000))
    for (task, effort), share in {
        ("chain", "high"): 0.6,
        ("chain", "low"): 0.15,
        ("add", "high"): 0.2,
        ("add", "low"): 0.05,
    }.items():
        assert counts[task, effort] / 4000 == pytest.approx(share, abs=0.025)


def test_problems_are_new_and_of_the_side_that_pretraining_saw():
    prompts = Prompts(settings()).draw(300)
    seeds = [prompt.problem.seed for prompt in prompts]
    assert len(set(seeds)) == 300
    assert min(seeds) >= 70_000_000  # beyond the seeds of every split
    assert not any(is_held_out(prompt.problem) for prompt in prompts)
    other = [prompt.problem.seed for prompt in Prompts(settings(seed=1)).draw(50)]
    assert set(other).isdisjoint(seeds)


def test_by_default_all_embedded_families_and_efforts_are_asked():
    counts = Counter((prompt.problem.task, prompt.effort) for prompt in Prompts(PromptSettings()).draw(900))
    assert set(counts) == {(task, effort) for task in TASKS for effort in ("low", "medium", "high")}
    assert min(counts.values()) > 60


def test_pass_rates_out_of_bounds_are_passed_over():
    stream = Prompts(settings(min_answers=8, explore=0.0))
    for prompt in stream.draw(400):
        stream.record(prompt, 8, 8 if level(prompt) <= 4 else 0 if level(prompt) >= 9 else 4)
    assert {level(prompt) for prompt in stream.draw(300)} <= {5, 6, 7, 8}
    exploring = Prompts(settings(min_answers=8, explore=0.3))
    exploring.set_state(stream.get_state())
    outside = sum(not 5 <= level(prompt) <= 8 for prompt in exploring.draw(1000)) / 1000
    assert 0.12 < outside < 0.3


def test_bounds_are_inclusive_and_wait_for_enough_answers():
    stream = Prompts(settings(min_answers=10, min_pass_rate=0.25, max_pass_rate=0.5))
    prompt = next(iter(stream.draw(1)))
    stream.record(prompt, 8, 0)
    assert stream.pass_rate(prompt) is None
    stream.record(prompt, 8, 8)  # the first answers have decayed to a weight of 7.2
    assert stream.pass_rate(prompt) == pytest.approx(8 / 15.2)
    stream.record(prompt, 0, 0)
    assert stream.pass_rate(prompt) == pytest.approx(8 / 15.2)


def test_a_rate_follows_the_policy():
    stream = Prompts(settings(min_answers=4))
    prompt = next(iter(stream.draw(1)))
    for _ in range(40):
        stream.record(prompt, 4, 0)
    for _ in range(20):
        stream.record(prompt, 4, 4)
    assert present(stream.pass_rate(prompt)) > 0.85


def test_efforts_have_rates_of_their_own():
    stream = Prompts(settings(efforts={"low": 1.0, "high": 1.0}, min_answers=4, explore=0.0))
    for prompt in stream.draw(400):
        stream.record(prompt, 4, 2 if prompt.effort == "high" else 0)
    assert {prompt.effort for prompt in stream.draw(200)} == {"high"}
    assert stream.without_signal() == {("chain", "low"): 0.0}


def test_a_task_without_signal_leaves_its_share_to_others():
    stream = Prompts(settings(tasks={"chain": 9.0, "add": 1.0}, min_answers=4, explore=0.0))
    for prompt in stream.draw(600):
        stream.record(prompt, 4, 4 if prompt.problem.task == "chain" else 2)
    assert {prompt.problem.task for prompt in stream.draw(100)} == {"add"}
    assert stream.without_signal() == {("chain", "high"): 1.0}


def test_nothing_to_learn_from_is_said():
    stream = Prompts(settings(min_answers=4, explore=0.0))
    for prompt in stream.draw(600):
        stream.record(prompt, 4, 0)
    with pytest.raises(PuzzleError, match=r"has a pass rate from 0.1 to 0.9: there is nothing to learn from chain"):
        stream.draw(1)
    with pytest.raises(PuzzleError, match="none of 64 problems of any task and effort is short enough"):
        Prompts(settings(), fits=lambda prompt: False).draw(1)


def test_only_what_fits_is_asked():
    stream = Prompts(settings(), fits=lambda prompt: level(prompt) < 6)
    assert max(level(prompt) for prompt in stream.draw(200)) == 5
    assert stream.too_long > 0 and level(stream.first_too_long) >= 6
    going_on = Prompts(settings())
    going_on.set_state(stream.get_state())
    assert going_on.too_long == stream.too_long
    going_on.set_state({name: value for name, value in stream.get_state().items() if name != "too_long"})
    assert going_on.too_long == 0


def test_rows_of_a_file_come_round_and_have_rates_of_their_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "answer": str(n)}) + "\n" for n in range(90)))
    stream = Prompts(settings(tasks={str(path): 1.0}, min_answers=4, explore=0.0))
    rows = len(stream._rows[str(path)])
    assert 5 < rows < 30  # the training split's share of them
    first, second = ([p.problem.seed for p in stream.draw(rows)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(set(first)) and first != second
    for prompt in stream.draw(rows):
        stream.record(prompt, 4, 2 if prompt.problem.seed == first[0] else 0)
    assert {prompt.problem.seed for prompt in stream.draw(20)} == {first[0]}


def test_a_stream_goes_on_where_another_was():
    def told(stream, count):
        asked = stream.draw(count)
        for prompt in asked:
            stream.record(prompt, 4, level(prompt) % 5)
        return [(prompt.problem.prompt, prompt.effort) for prompt in asked]

    both = settings(tasks={"chain": 1.0, "recall": 2.0}, efforts={"low": 1.0, "medium": 1.0}, min_answers=4)
    whole, begun, going_on = (Prompts(both) for _ in range(3))
    expected = [told(whole, 40), told(whole, 40)]
    assert told(begun, 40) == expected[0]
    going_on.set_state(json.loads(json.dumps(begun.get_state())))
    assert told(going_on, 40) == expected[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"efforts": {}}, "prompts.efforts is empty, but must hold at least one of low, medium, high"),
        ({"efforts": {"huge": 1.0}}, "effort is 'huge'"),
        ({"tasks": {"chain": 0.0}}, "prompts.tasks.chain is 0.0, but must be above 0"),
        ({"efforts": {"low": float("nan")}}, "prompts.efforts.low is nan"),
        ({"prompts": 0}, "prompts.prompts is 0, but must be at least 1"),
        ({"min_answers": 0}, "prompts.min_answers is 0"),
        ({"min_pass_rate": 0.9}, "prompts.min_pass_rate is 0.9 and prompts.max_pass_rate 0.9"),
        ({"max_pass_rate": 1.1}, "prompts.max_pass_rate 1.1"),
        ({"explore": -0.1}, "prompts.explore is -0.1, but must be from 0 to 1"),
        ({"seed": 100}, "prompts.seed is 100, but must be from 0 to 99"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        settings(**changes)


def test_unknown_tasks_are_refused():
    with pytest.raises(ConfigError, match="task is 'chess', but must be one of"):
        Prompts(settings(tasks={"chess": 1.0}))
