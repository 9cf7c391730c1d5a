"""A journal of answers, so that a run resumed after a kill asks only the questions that have no answer yet.

Answers are appended to a JSONL file of traces as they come, in any order; a half-written last line that a kill leaves
is cut off. Answers do not depend on what is generated beside them, so a run resumed from its journal ends with the
answers of a run that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from puzzle_jax.errors import PuzzleError
from puzzle_jax.generate.traces import Trace, append_trace, open_to_append, read_traces
from puzzle_jax.tasks import Problem

Question = tuple[Problem, str]
"""A problem and the effort it is asked at."""

Key = tuple[str, int, str]
"""Task, problem seed and effort, which identify a question."""


def question_key(question: Question) -> Key:
    problem, effort = question
    return problem.task, problem.seed, effort


def journaled_answers(
    path: Path,
    questions: Sequence[Question],
    ask: Callable[..., object],
    *,
    wanted: Collection[Key] | None = None,
    on_answers: Callable[[int], None] | None = None,
) -> list[Trace]:
    """The answers to all wanted questions, in the order of the questions.

    Args:
      path: the journal; created, with its directory, where it is missing.
      questions: all questions; those with the keys `wanted` are asked, by default every one.
      ask: `answer_questions` with its model and questions: called with `skip`, the indices of the questions not to
        ask, and `on_answer`; not called where all answers are there.
      on_answers: called with the number of further answers, starting with those of an earlier run.

    Raises PuzzleError where the journal cannot be read or holds an answer to another question.
    """
    keys = [question_key(question) for question in questions]
    wanted = set(keys if wanted is None else wanted)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = read_traces(path, torn_tail=True) if path.exists() else []
    answers = {(trace.task, trace.problem_seed, trace.effort): trace for trace in kept}
    for key in answers:
        if key not in wanted:
            raise PuzzleError(f"{path} holds an answer to {key}, which was not asked; remove the file")
    if on_answers is not None:
        on_answers(len(answers))
    if len(answers) < len(wanted):
        with open_to_append(path) as file:

            def keep(number: int, answer: Trace) -> None:
                append_trace(file, answer)
                answers[keys[number]] = answer
                if on_answers is not None:
                    on_answers(1)

            skip = {number for number, key in enumerate(keys) if key in answers or key not in wanted}
            ask(skip=skip, on_answer=keep)
    return [answers[key] for key in keys if key in wanted]
