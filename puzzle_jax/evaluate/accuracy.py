"""Accuracy and generated tokens of a model on tasks with verifiable answers, per reasoning effort.

All models answer the same problems with the same seeds, so that differences between models are paired. Left out:
confidence intervals of differences, and request-level efficiency.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate import Generated, Request, generate
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.child import View
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import Chat, Problem, check_effort, get_task, problems

SPLIT_STRIDE, SEED_STRIDE = 10_000_000, 100_000
SPLITS = ("calibration", "validation", "heldout", "accuracy")


@dataclass(frozen=True)
class QuestionSet:
    """Which problems are asked, at which efforts.

    Attributes:
      tasks: names of task families.
      per_task: problems of each task; every one is asked at every effort.
      split: one of `SPLITS`; splits of one seed share no problem's seed.
      seed: draws other problems of the same split.
    """

    tasks: tuple[str, ...]
    efforts: tuple[str, ...]
    per_task: int
    split: str
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        for effort in self.efforts:
            check_effort(effort)
        if not self.tasks or not self.efforts or self.per_task < 1:
            raise ConfigError(
                f"tasks {self.tasks}, efforts {self.efforts} and per_task {self.per_task} ask no question"
            )
        if self.split not in SPLITS:
            raise ConfigError(f"split is {self.split!r}, but must be one of {', '.join(SPLITS)}")
        if not 0 <= self.seed < SPLIT_STRIDE // SEED_STRIDE:
            raise ConfigError(f"seed is {self.seed}, but must be from 0 to {SPLIT_STRIDE // SEED_STRIDE - 1}")

    def questions(self) -> list[tuple[Problem, str]]:
        """Problems with the effort they are asked at."""
        first = SPLITS.index(self.split) * SPLIT_STRIDE + self.seed * SEED_STRIDE
        return [
            (problem, effort)
            for task in self.tasks
            for problem in itertools.islice(problems(get_task(task), first_seed=first), self.per_task)
            for effort in self.efforts
        ]


def answer_questions(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    questions: QuestionSet,
    *,
    max_tokens: Mapping[str, int],
    temperature: float = 0.0,
    batch_size: int = 64,
    view: View | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Trace]:
    """Asks every question; `max_tokens` is the limit per effort, the rest as in `generate`."""
    asked = questions.questions()
    requests = []
    for index, (problem, effort) in enumerate(asked):
        prompt = tuple(chat.prompt_tokens(problem.prompt, effort))
        requests.append(Request(prompt, max_tokens[effort], seed=questions.seed * SEED_STRIDE + index))
    completions = generate(
        params,
        config,
        requests,
        stop_ids=sorted(chat.stop_ids),
        temperature=temperature,
        batch_size=batch_size,
        view=view,
        on_batch=on_batch,
    )
    return [
        _judge(chat, problem, effort, request, completion)
        for (problem, effort), request, completion in zip(asked, requests, completions, strict=True)
    ]


def _judge(chat: Chat, problem: Problem, effort: str, request: Request, completion: Generated) -> Trace:
    final = chat.parse(completion.tokens).final
    correct = not completion.truncated and get_task(problem.task).verify(problem, final)
    return Trace(
        problem.task,
        effort,
        problem.seed,
        dict(problem.details),
        request.prompt,
        completion.tokens,
        float(correct),
        completion.truncated,
    )


@dataclass(frozen=True)
class EffortResult:
    """Accuracy with its standard error, mean generated tokens, and the share of answers cut short."""

    accuracy: float
    accuracy_se: float
    mean_tokens: float
    truncated: float
    answers: int


def summarise(answers: Sequence[Trace]) -> EffortResult:
    """Means over answers; raises ConfigError when there are none."""
    if not answers:
        raise ConfigError("there are no answers to summarise")
    count = len(answers)
    accuracy = sum(a.correct for a in answers) / count
    return EffortResult(
        accuracy=accuracy,
        accuracy_se=math.sqrt(accuracy * (1 - accuracy) / count),
        mean_tokens=sum(len(a.completion) for a in answers) / count,
        truncated=sum(a.truncated for a in answers) / count,
        answers=count,
    )


def by_effort(answers: Sequence[Trace], efforts: Sequence[str]) -> dict[str, EffortResult]:
    """One result per effort, over all tasks."""
    return {effort: summarise([a for a in answers if a.effort == effort]) for effort in efforts}
