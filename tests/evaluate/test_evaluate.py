import jax
import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, by_effort, summarise
from puzzle_jax.evaluate.throughput import measure_throughput, summary
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.spec import init_params
from puzzle_jax.tasks import is_held_out
from puzzle_jax.tasks.tokenizer import embedded_chat
from tests.support import small_config


def questions(**changes) -> QuestionSet:
    settings = {"tasks": ("chain", "add"), "efforts": ("low", "high"), "per_task": 3, "split": "accuracy", "seed": 4}
    return QuestionSet(**{**settings, **changes})


def test_questions_pair_every_problem_with_every_effort():
    asked = questions().questions()
    assert [(p.task, effort) for p, effort in asked] == [
        *[("chain", "low"), ("chain", "high")] * 3,
        *[("add", "low"), ("add", "high")] * 3,
    ]
    assert len({p.seed for p, _ in asked if p.task == "chain"}) == 3
    assert all(is_held_out(p) for p, _ in asked)
    assert asked == questions().questions()


def test_splits_and_seeds_share_no_problem_seed():
    sets = [questions(split=split, seed=seed) for split in ("calibration", "validation", "heldout") for seed in (0, 1)]
    seeds = [{p.seed for p, _ in s.questions()} for s in sets]
    for i, first in enumerate(seeds):
        for second in seeds[i + 1 :]:
            assert not first & second


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tasks": ("poetry",)}, "task is 'poetry'"),
        ({"efforts": ("extreme",)}, "effort is 'extreme'"),
        ({"per_task": 0}, "ask no question"),
        ({"tasks": ()}, "ask no question"),
        ({"split": "test"}, "split is 'test'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_questions_are_refused(changes, message):
    with pytest.raises(PuzzleError, match=message):
        questions(**changes)


def test_answers_are_judged_by_their_final_channel():
    """A model cannot answer at random: every answer of an untrained one is wrong, and cut at its limit."""
    config = small_config(vocab_size=128)
    params = init_params(config, jax.random.key(0))
    limits = {"low": 5, "high": 7}
    answers = answer_questions(params, config, embedded_chat(), questions(), max_tokens=limits, batch_size=6)
    assert [a.effort for a in answers] == ["low", "high"] * 6
    assert not any(a.correct for a in answers)
    for answer in answers:
        assert answer.truncated == (len(answer.completion) == limits[answer.effort])


def test_summaries_by_hand():
    def answer(effort, correct, tokens, truncated=False):
        return Trace("chain", effort, 0, {}, (1,), tuple(range(tokens)), float(correct), truncated)

    answers = [
        answer("low", True, 4),
        answer("low", False, 8, True),
        answer("high", True, 10),
        answer("high", True, 20),
    ]
    results = by_effort(answers, ("low", "high"))
    assert results["low"].accuracy == 0.5 and results["low"].mean_tokens == 6 and results["low"].truncated == 0.5
    assert results["low"].accuracy_se == pytest.approx((0.25 / 2) ** 0.5)
    assert results["high"].accuracy == 1 and results["high"].accuracy_se == 0 and results["high"].answers == 2
    with pytest.raises(ConfigError, match="no answers"):
        summarise([])


def test_every_model_runs_every_round():
    config = small_config((BlockConfig(7, 5), BlockConfig(3, None)))
    params = init_params(config, jax.random.key(0))
    models = {"a": (params, config), "b": (params, config)}
    rounds = []
    results = measure_throughput(
        models, batch=3, input_tokens=20, output_tokens=6, rounds=2, on_round=lambda: rounds.append(1)
    )
    assert [r.rounds for r in results.values()] == [2, 2] and len(rounds) == 3
    assert all(r.low <= r.tokens_per_second <= r.high for r in results.values())


def test_throughput_counts_generated_tokens_over_all_seconds():
    result = summary([(1.0, 1.0), (1.0, 3.0), (0.5, 0.5)], tokens=12)
    assert (result.tokens_per_second, result.low, result.high) == (6.0, 3.0, 12.0)
    assert (result.prefill_seconds, result.decode_seconds) == (1.0, 1.0)
