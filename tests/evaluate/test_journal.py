"""The journal of answers: answered questions are not asked again, whatever a kill left of the file."""

import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluate.journal import journaled_answers, question_key
from puzzle_jax.generate.traces import Trace
from puzzle_jax.tasks import Problem

QUESTIONS = [(Problem("chain", seed, f"mod {seed}", "7"), effort) for seed in (3, 5) for effort in ("low", "high")]


def answer(number):
    problem, effort = QUESTIONS[number]
    return Trace(problem.task, effort, problem.seed, {}, (1, number), (2,), 1.0, False)


class Model:
    """Answers in reverse order, and dies after `dies_after` answers."""

    def __init__(self, dies_after=99):
        self.dies_after, self.asked = dies_after, []

    def __call__(self, skip, on_answer):
        for number in reversed(range(len(QUESTIONS))):
            if number not in skip:
                if len(self.asked) == self.dies_after:
                    raise KeyboardInterrupt
                self.asked.append(number)
                on_answer(number, answer(number))


def test_answers_come_in_the_order_of_the_questions_and_are_asked_once(tmp_path):
    path, dying, model, counts = tmp_path / "deep/er.jsonl", Model(dies_after=1), Model(), []
    with pytest.raises(KeyboardInterrupt):
        journaled_answers(path, QUESTIONS, dying)
    with open(path, "a") as file:
        file.write('{"task": "chain", "effo')  # what a kill leaves
    found = journaled_answers(path, QUESTIONS, model, on_answers=counts.append)
    assert found == [answer(number) for number in range(4)]
    assert (dying.asked, model.asked, counts) == ([3], [2, 1, 0], [1, 1, 1, 1])
    again = Model()
    assert journaled_answers(path, QUESTIONS, again) == found and again.asked == []


def test_some_of_the_questions_are_wanted_and_an_answer_to_another_is_refused(tmp_path):
    path, model = tmp_path / "a.jsonl", Model()
    wanted = [question_key(QUESTIONS[number]) for number in (0, 3)]
    assert journaled_answers(path, QUESTIONS, model, wanted=wanted) == [answer(0), answer(3)] and model.asked == [3, 0]
    with pytest.raises(PuzzleError, match=r"a\.jsonl holds an answer to \('chain', 5, 'high'\), which was not asked"):
        journaled_answers(path, QUESTIONS, model, wanted=wanted[:1])
