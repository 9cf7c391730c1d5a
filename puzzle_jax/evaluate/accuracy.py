"""A model's answers to tasks with verifiable answers, at every reasoning effort, and whether they are correct.

All models answer the same problems with the same seeds, so that differences between models are paired.

A scorer that fails costs only the answer it was scoring: unless its time is bounded by the length of the text, it runs
in processes of its own with a time limit (`tasks.rewards.workers`), while further answers are generated. An answer that
cannot be scored gets the reward 0 and records why (`Trace.unscored`, `unscored_note`).
"""

from __future__ import annotations

import itertools
import os
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, Unpack, runtime_checkable

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError, PuzzleWarning, check_choice, check_range
from puzzle_jax.evaluate.settings import MAX_TOKENS
from puzzle_jax.generate import Generated, GenerateOptions, Request, generate
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.spec import Params
from puzzle_jax.processes.distributed import process_index
from puzzle_jax.tasks import Chat, FiniteTask, Problem, check_effort, get_task, problems
from puzzle_jax.tasks.chat.embedded import is_embedded
from puzzle_jax.tasks.chat.formats import alike
from puzzle_jax.tasks.context import check_fits
from puzzle_jax.tasks.rewards.answers import Answer, Reward
from puzzle_jax.tasks.rewards.workers import RewardWorkers

SPLIT_STRIDE, SEED_STRIDE = 10_000_000, 100_000
SPLITS = ("calibration", "validation", "heldout", "accuracy", "evaluation", "confirmation", "training")
DISJOINT_SPLITS = tuple(split for split in SPLITS if split != "evaluation")
"""The splits of a search and of training, which are disjoint; "evaluation" is for measuring a model on its own."""

UNSEEN = "unseen"
"""For endless families, the split "evaluation"; for finite tasks, the rows of "accuracy", which only reports use."""

_MOST_SCORERS, _MOST_REASONS = 4, 3


@runtime_checkable
class Scorers(Protocol):
    """Scores answers while the caller does something else, as `tasks.rewards.workers.RewardWorkers` does."""

    def begin(self, answer: Answer, *, own_score: bool = False) -> int: ...

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]: ...


class Unscored:
    """`Scorers` for a process whose scores are not used: every answer gets the reward 0."""

    def __init__(self) -> None:
        self._begun = 0
        self._open: list[int] = []

    def begin(self, answer: Answer, *, own_score: bool = False) -> int:
        self._open.append(self._begun)
        self._begun += 1
        return self._open[-1]

    def finished(self, *, wait: bool) -> list[tuple[int, Reward]]:
        found, self._open = self._open, []
        return [(ticket, Reward(0.0, None)) for ticket in found]


@dataclass(frozen=True)
class QuestionSet:
    """Problems and the efforts at which they are asked.

    In an endless family, no two splits or seeds share a problem seed; in an embedded family, "training" draws from the
    side of `is_held_out` that pretraining saw and the other splits from the other side, so that it shares no prompt
    with them. The rows of a finite task are divided among `DISJOINT_SPLITS` by a hash of the prompt, about a sixth to
    each, so that these never share a row or a prompt, whatever the seeds; "evaluation" draws from all rows, including
    those that a search or training has seen, so a model that was trained on a file's prompts should be evaluated on
    another file or on `UNSEEN`. Where there are fewer problems than requested, all of them are asked.

    Attributes:
      tasks, efforts: task names as in `get_task`, and efforts; every problem is asked at every effort.
      per_task: most problems of each task, or this by effort, where the smaller sets are parts of the larger ones.
      split, seed: one of `SPLITS` or `UNSEEN`, and a seed; other seeds draw other problems of the split.
    """

    tasks: tuple[str, ...]
    efforts: tuple[str, ...]
    per_task: int | Mapping[str, int]
    split: str
    seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            get_task(task)
        for effort in self.efforts:
            check_effort(effort)
        if not self.tasks or not self.efforts or min(map(self.asked_at, self.efforts)) < 1:
            raise ConfigError(
                f"tasks {self.tasks}, efforts {self.efforts} and per_task {self.per_task} ask no question"
            )
        check_choice("split", self.split, (*SPLITS, UNSEEN))
        check_range("seed", self.seed, 0, SPLIT_STRIDE // SEED_STRIDE - 1)

    @property
    def task_identities(self) -> dict[str, str]:
        """The identity of every task, which is part of the identity of anything derived from the answers."""
        return {name: get_task(name).identity for name in self.tasks}

    def questions(self) -> list[tuple[Problem, str]]:
        """Problems, each with the effort it is asked at."""
        asked = []
        for name in self.tasks:
            drawn = self._problems(name)
            places = {problem.seed: place for place, problem in enumerate(drawn)}
            for problem in sorted(drawn, key=lambda problem: problem.seed):
                asked += [(problem, e) for e in self.efforts if places[problem.seed] < self.asked_at(e)]
        return asked

    def asked_at(self, effort: str) -> int:
        """The most problems of each task that are asked at an effort."""
        return self.per_task if isinstance(self.per_task, int) else self.per_task.get(effort, 0)

    def _problems(self, name: str) -> list[Problem]:
        """The problems of a task, in the order in which a smaller set takes them."""
        task = get_task(name)
        if isinstance(task, FiniteTask):
            return self._rows(task)
        most = self._most
        check_range(f"problems of task {name!r}", most, 1, SEED_STRIDE)
        split = "evaluation" if self.split == UNSEEN else self.split
        first = SPLITS.index(split) * SPLIT_STRIDE + self.seed * SEED_STRIDE
        drawn = problems(task, first_seed=first, held_out=self.split != "training")
        return list(itertools.islice(drawn, most))

    @property
    def _most(self) -> int:
        return max(map(self.asked_at, self.efforts))

    def _rows(self, task: FiniteTask) -> list[Problem]:
        """The split's first rows in the seed's random order, so that any prefix is a random sample of the file too."""
        rows = list(problems(task))
        if self.split != "evaluation":
            split = "accuracy" if self.split == UNSEEN else self.split
            part, parts = DISJOINT_SPLITS.index(split), len(DISJOINT_SPLITS)
            rows = [row for row in rows if zlib.crc32(row.prompt.encode()) % parts == part]
        if not rows:
            raise ConfigError(
                f"split {self.split!r} gets none of the {task.size} problems of {task.name}, "
                "which are divided among six splits; give it more problems"
            )
        random.Random(f"rows:{self.seed}").shuffle(rows)
        return rows[: self._most]


def answer_questions(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    questions: QuestionSet,
    *,
    max_tokens: Mapping[str, int],
    skip: Collection[int] = (),
    scorers: Scorers | None = None,
    on_answer: Callable[[int, Trace], None] | None = None,
    **options: Unpack[GenerateOptions],
) -> list[Trace]:
    """Asks the questions.

    Args:
      params, config, chat: the model, with weights in the compute dtype.
      questions: what to ask.
      max_tokens: limit per effort.
      skip: indices into `questions.questions()` that are not asked.
      scorers: workers for tasks whose scorers are not bounded; by default the primary process starts some for this
        call, and other processes score nothing (`Unscored`), since scores may differ from host to host.
      on_answer: called with a question's index and its answer as soon as it is scored, in any order.
      options: options of `generate`. One context for all questions compiles one set of programs; rounding, and so an
        occasional answer, depends on it.

    Returns:
      The answers to the questions that were asked, in the order of the questions.
    """
    asked = [(i, question) for i, question in enumerate(questions.questions()) if i not in skip]
    requests = [
        Request(
            tuple(chat.prompt_tokens(problem.prompt, effort)), max_tokens[effort], questions.seed * SEED_STRIDE + index
        )
        for index, (problem, effort) in asked
    ]
    tasks = {name: get_task(name) for name in questions.tasks}
    answers: dict[int, Trace] = {}
    scored_elsewhere: dict[int, tuple[int, Generated]] = {}

    def finish(position: int, completion: Generated) -> None:
        _, (problem, effort) = asked[position]
        parsed = chat.parse(completion.tokens, requests[position].prompt)
        task, tokens = tasks[problem.task], len(completion.tokens)
        if task.bounded:
            score = 0.0 if completion.truncated else task.score(problem, parsed.final)
            keep(position, completion, Reward(score, None))
            return
        assert scorers is not None
        answer = Answer(problem, effort, parsed.analysis, parsed.final, tokens, completion.truncated)
        scored_elsewhere[scorers.begin(answer, own_score=True)] = position, completion
        collect(wait=False)

    def collect(wait: bool) -> None:
        assert scorers is not None
        for ticket, reward in scorers.finished(wait=wait):
            keep(*scored_elsewhere.pop(ticket), reward)

    def keep(position: int, completion: Generated, reward: Reward) -> None:
        index, (problem, effort) = asked[position]
        answers[index] = Trace(
            problem.task,
            effort,
            problem.seed,
            dict(problem.details),
            requests[position].prompt,
            completion.tokens,
            reward.reward or 0.0,
            completion.truncated,
            unscored=reward.reason,
        )
        if on_answer is not None:
            on_answer(index, answers[index])

    with ExitStack() as stack:
        if scorers is None and not all(tasks[problem.task].bounded for _, (problem, _) in asked):
            workers = min(_MOST_SCORERS, os.cpu_count() or 1)
            scorers = Unscored() if process_index() else stack.enter_context(RewardWorkers(processes=workers))
        generate(params, config, requests, stop_ids=sorted(chat.stop_ids), on_finish=finish, **options)
        while scored_elsewhere:
            collect(wait=True)
    return [answers[index] for index, _ in asked]


def check_context(
    questions: Iterable[tuple[Problem, str]],
    chat: Chat,
    config: ModelConfig,
    max_tokens: Mapping[str, int],
    whose: str,
) -> int:
    """The most positions that any question takes with its longest answer; messages call the model `whose`.

    Warns with PuzzleWarning where the limits are those that suit the embedded parent but the model is another one, most
    of whose answers would be truncated, and where efforts differ neither for the chat template nor in their limits.
    Raises ConfigError, naming the problem's file and line, or its task and number, where a question with its answer is
    longer than the model's context.
    """
    longest, questions = 0, list(questions)
    asked = {effort: max_tokens[effort] for _, effort in questions}
    if questions and all(MAX_TOKENS[effort] == limit for effort, limit in asked.items()) and not is_embedded(chat):
        limits = ", ".join(f"{limit} at effort {effort}" for effort, limit in asked.items())
        warnings.warn(
            f"answers to {len(questions)} questions end after {limits} tokens, limits that suit the embedded parent "
            f"but hardly {whose}; max_tokens sets others",
            PuzzleWarning,
            stacklevel=2,
        )
    for efforts in alike(chat.format, asked):
        warnings.warn(
            f"the chat template {chat.template.where} renders efforts {' and '.join(efforts)} alike, and max_tokens "
            f"gives them one limit, {asked[efforts[0]]} tokens, so that {whose} answers the same questions more than "
            "once; give each effort a limit of its own, or ask at one of them",
            PuzzleWarning,
            stacklevel=2,
        )
    for problem, effort in questions:
        prompt, limit = len(chat.prompt_tokens(problem.prompt, effort)), max_tokens[effort]
        taken = check_fits(problem.where, prompt, limit, config.max_position, whose, f" at effort {effort}")
        longest = max(longest, taken)
    return longest


def unscored_note(answers: Sequence[Trace]) -> str | None:
    """A sentence that says how many answers could not be scored, and why; None where all were scored."""
    reasons = Counter(answer.unscored for answer in answers if answer.unscored is not None)
    if not reasons:
        return None
    listed = "; ".join(f"{count}: the scorer {reason}" for reason, count in reasons.most_common(_MOST_REASONS))
    more = "; ..." if len(reasons) > _MOST_REASONS else ""
    return f"{reasons.total()} of {len(answers)} answers could not be scored and count as wrong ({listed}{more})"
