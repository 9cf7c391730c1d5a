import json
import warnings
from dataclasses import replace
from functools import partial

import pytest
import tokenizers

from puzzle_jax.errors import ConfigError, PuzzleError, PuzzleWarning
from puzzle_jax.evaluate.__main__ import VERBS
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.settings import MAX_TOKENS
from puzzle_jax.evaluate.statistics import by_effort, by_task, summarise
from puzzle_jax.generate.traces import Trace
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks import EFFORTS, is_held_out
from puzzle_jax.tasks.arithmetic import Chain
from puzzle_jax.tasks.chat.embedded import embedded_chat
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from tests.support import random_params, small_config
from tests.tasks.chat.qwen import HYBRID, write_chat


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
    fewer = questions(per_task={"low": 3, "medium": 9, "high": 1}).questions()
    assert fewer == [asked[place] for place in (0, 1, 2, 4, 6, 7, 8, 10)]


def test_unseen_rows_are_those_that_neither_choose_nor_train(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {row}", "answer": "7"}) + "\n" for row in range(41)))

    def rows(split: str) -> set[int]:
        return {p.seed for p, _ in questions(tasks=(str(file),), per_task=41, split=split).questions()}

    fewer = questions(tasks=(str(file),), per_task={"low": 12, "high": 3}, split="evaluation").questions()
    low, high = ([p.seed for p, effort in fewer if effort == of] for of in ("low", "high"))
    assert low == sorted(low) and high == sorted(high) and len(low) == 12 and len(high) == 3
    assert set(high) < set(low) and high != low[:3]  # three of the twelve chosen by the seed, not the first in the file

    unseen = rows("unseen")
    assert unseen == rows("accuracy") and 0 < len(unseen) < 20 and unseen < rows("evaluation")
    for split in ("calibration", "validation", "heldout", "confirmation", "training"):
        assert not unseen & rows(split)
    # For a family with endless problems, they are those of the evaluation.
    assert questions(split="unseen").questions() == questions(split="evaluation").questions()


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
        ({"per_task": {"low": 2}}, "ask no question"),
        ({"tasks": ()}, "ask no question"),
        ({"split": "test"}, "split is 'test'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_questions_are_refused(changes, message):
    with pytest.raises(PuzzleError, match=message):
        questions(**changes)


LIMITS = {"low": 5, "high": 7}


@pytest.fixture(scope="module")
def ask():
    config = small_config(vocab_size=128)
    params = random_params(config, 0)
    return partial(
        answer_questions, params, config, embedded_chat(), questions(), max_tokens=LIMITS, slots=6, temperature=1.0
    )


@pytest.fixture(scope="module")
def answers(ask):
    return ask()


def test_answers_are_scored_by_their_final_channel(answers):
    """An untrained model's answers are all wrong; those without a stop token are cut off at their limit."""
    assert [a.effort for a in answers] == ["low", "high"] * 6
    assert not any(a.correct for a in answers)
    for answer in answers:
        assert answer.truncated == (answer.completion[-1] not in embedded_chat().stop_ids)
        assert not answer.truncated or len(answer.completion) == LIMITS[answer.effort]
    assert any(answer.truncated for answer in answers)


def test_skipped_questions_are_not_asked_and_change_no_other_answer(ask, answers):
    seen = {}
    some = ask(skip={0, 3, 4, 11}, on_answer=seen.__setitem__)
    left = [1, 2, 5, 6, 7, 8, 9, 10]
    assert sorted(seen) == left
    assert some == [answers[index] for index in left] == [seen[index] for index in left]


def test_summaries_by_hand():
    def answer(effort, reward, tokens, truncated=False, task="chain"):
        return Trace(task, effort, 0, {}, (1,), tuple(range(tokens)), reward, truncated)

    answers = [
        answer("low", 1.0, 4),
        answer("low", 0.5, 8, True),
        answer("high", 1.0, 10),
        answer("high", 1.0, 20, task="add"),
    ]
    results = by_effort(answers, ("low", "high"))
    low, high = results["low"], results["high"]
    assert (low.accuracy, low.mean_reward, low.mean_tokens, low.truncated) == (0.5, 0.75, 6, 0.5)
    assert low.token_quantiles == pytest.approx({"10": 4.4, "50": 6.0, "90": 7.6, "99": 7.96})
    assert low.accuracy_se == pytest.approx((0.25 / 2) ** 0.5)
    assert low.low == pytest.approx(1 - low.high) and 0 < low.low < 0.5
    assert high.accuracy == 1 and high.accuracy_se == 0 and high.answers == 2 and high.high == 1.0
    assert [(task, found.mean_tokens) for task, found in by_task(answers[2:]).items()] == [("chain", 10), ("add", 20)]
    with pytest.raises(ConfigError, match="no answers"):
        summarise([])


def test_one_context_for_all_questions_gives_the_same_answers(ask, answers):
    """Slots have 256 positions either way: set explicitly here, derived from the questions' lengths there."""
    assert ask(context=256) == answers


class Late:
    """RewardWorkers that return one reward per wait, the latest first."""

    def __init__(self):
        self.begun: list[Answer] = []
        self.left: list[int] = []

    def begin(self, answer: Answer, *, own_score: bool = False) -> int:
        assert own_score
        self.begun.append(answer)
        self.left.append(len(self.begun) - 1)
        return self.left[-1]

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]:
        if not wait or not self.left:
            return []
        ticket = self.left.pop()
        return [(ticket, Reward(0.0, "took longer than 10 s") if ticket % 2 else Reward(0.5, None))]


def test_unbounded_scorers_run_elsewhere_and_a_lost_answer_is_0_with_its_reason(ask, answers, monkeypatch):
    monkeypatch.setattr(Chain, "bounded", False)
    late, seen = Late(), []
    found = ask(scorers=late, on_answer=lambda index, answer: seen.append((index, answer)))
    chain, add = slice(0, 6), slice(6, 12)
    assert found[add] == answers[add] and len(late.begun) == 6
    assert sorted(index for index, _ in seen) == list(range(12)) and all(found[index] == one for index, one in seen)
    for answer, one in zip(found[chain], answers[chain], strict=True):
        asked = [begun for begun in late.begun if begun.problem.seed == one.problem_seed and begun.effort == one.effort]
        lost = late.begun.index(asked[0]) % 2
        assert (answer.completion, answer.truncated) == (one.completion, one.truncated)
        assert (answer.reward, answer.unscored) == ((0.0, "took longer than 10 s") if lost else (0.5, None))
    assert summarise(found).unscored == 3 and summarise(answers).unscored == 0
    assert unscored_note(answers) is None
    assert unscored_note(found) == (
        "3 of 12 answers could not be scored and count as wrong (3: the scorer took longer than 10 s)"
    )


def test_processes_of_its_own_score_as_the_tasks_do(ask, answers, monkeypatch):
    monkeypatch.setattr(Chain, "bounded", False)
    assert ask() == answers


def test_what_exceeds_the_context_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1+1=" * times, "answer": "2"}) + "\n" for times in (1, 2, 500)))
    asked = questions(tasks=(str(path),), split="evaluation").questions()
    config, chat = small_config(vocab_size=128), embedded_chat()
    longest = check_context(asked[:4], chat, config, LIMITS, "it")
    assert longest == max(len(chat.prompt_tokens(p.prompt, effort)) + LIMITS[effort] for p, effort in asked[:4])
    tokens = len(chat.prompt_tokens("1+1=" * 500, "low"))
    with pytest.raises(ConfigError) as caught:
        check_context(asked, chat, config, LIMITS, "model 'a'")
    assert str(caught.value) == (
        f"{path}, line 3: the prompt takes {tokens} tokens and the answer up to 5 at effort low, but the context of "
        f"model 'a' is {config.max_position} tokens"
    )


def test_limits_of_the_embedded_parent_give_a_warning_for_another_model():
    asked, config, embedded = questions().questions(), small_config(max_position=2048), embedded_chat()
    tokenizer = tokenizers.Tokenizer.from_str(embedded.tokenizer.to_str())
    tokenizer.add_tokens(["arithmetic"])
    other = replace(embedded, tokenizer=tokenizer)
    with pytest.warns(
        PuzzleWarning, match=r"answers to 12 questions end after 32 at effort low, 128 .* model 'a'; max_tok"
    ):
        check_context(asked, other, config, MAX_TOKENS, "model 'a'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_context(asked, other, config, {**MAX_TOKENS, "high": 200}, "model 'a'")
        check_context(asked, embedded, config, MAX_TOKENS, "model 'a'")


def test_efforts_that_differ_in_nothing_give_a_warning(tmp_path):
    chat = write_chat(tmp_path, HYBRID)
    config = small_config(max_position=2048)
    asked = [(problem, effort) for problem, _ in questions().questions()[:2] for effort in EFFORTS]
    with pytest.warns(
        PuzzleWarning, match="renders efforts medium and high alike, .* one limit, 50 tokens, so that"
    ) as told:
        check_context(asked, chat, config, dict.fromkeys(EFFORTS, 50), "model 'a'")
    assert len(told) == 1 and str(tmp_path / "chat_template.jinja") in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_context(asked, chat, config, {"low": 50, "medium": 50, "high": 51}, "model 'a'")


@pytest.mark.parametrize("text", ["low=3, high=400", "{low: 3, high: 400}"])
def test_limits_on_a_command_line(text):
    asked = parse(VERBS[""], ["--models", "a=b", "--out", "c", "--max-tokens", text])
    assert asked.max_tokens == {**MAX_TOKENS, "low": 3, "high": 400}


def test_one_limit_is_for_every_effort():
    asked = parse(VERBS[""], ["--models", "a=b", "--out", "c", "--max_tokens=9"])
    assert asked.max_tokens == dict.fromkeys(EFFORTS, 9)


@pytest.mark.parametrize("text", [" ", "low", "low=-1", "low=3,high=x", "hgh=3"])
def test_limits_that_are_none(text):
    with pytest.raises(ConfigError, match=r"max_tokens|effort is 'hgh'"):
        parse(VERBS[""], ["--models", "a=b", "--out", "c", "--max-tokens", text])


def test_more_problems_than_a_seed_has_are_refused():
    with pytest.raises(ConfigError, match="problems of task 'chain' is 1000000000, but must be from 1 to 100000"):
        questions(per_task=10**9).questions()
