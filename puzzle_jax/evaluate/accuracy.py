"""Answers of a model to tasks with verifiable answers, at every reasoning effort, and whether they are right.

All models answer the same problems with the same seeds, so that differences between models are paired.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate import Engine, Generated, Request, Sampling, generate
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.child import View
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import Chat, FiniteTask, Problem, Task, check_effort, get_task, problems

SPLIT_STRIDE, SEED_STRIDE = 10_000_000, 100_000
SPLITS = ("calibration", "validation", "heldout", "accuracy", "evaluation", "confirmation", "training")
DEALT_SPLITS = tuple(split for split in SPLITS if split != "evaluation")
"""The splits of a search and of training, which share nothing; "evaluation" is for judging a model by itself."""


@dataclass(frozen=True)
class QuestionSet:
    """Which problems are asked, at which efforts.

    Of an endless family, splits and seeds share no problem's seed; of an embedded family, "training" draws on the side
    of `is_held_out` that pretraining saw and the other splits on the other, so that it shares no prompt with them. The
    rows of a finite task are dealt to `DEALT_SPLITS` by a hash of the prompt, about a sixth to each, so that those
    never share a row nor a prompt, whatever the seeds; "evaluation" draws on all rows, also on those that a search or
    training has seen, so that a model that was trained on a file's prompts is judged on those of another file. Where
    there are fewer than asked for, all there are come.

    Attributes:
      tasks: names as of `get_task`.
      per_task: problems of each task, at most; every one is asked at every effort.
      split: one of `SPLITS`.
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
        return [(problem, effort) for name in self.tasks for problem in self._problems(name) for effort in self.efforts]

    def _problems(self, name: str) -> list[Problem]:
        task = get_task(name)
        if isinstance(task, FiniteTask):
            return self._rows(task)
        first = SPLITS.index(self.split) * SPLIT_STRIDE + self.seed * SEED_STRIDE
        drawn = problems(task, first_seed=first, held_out=self.split != "training")
        return list(itertools.islice(drawn, self.per_task))

    def _rows(self, task: FiniteTask) -> list[Problem]:
        """The split's rows that the seed puts first, in the order of the file."""
        rows = list(problems(task))
        if self.split != "evaluation":
            dealt = DEALT_SPLITS.index(self.split)
            rows = [row for row in rows if zlib.crc32(row.prompt.encode()) % len(DEALT_SPLITS) == dealt]
        if not rows:
            raise ConfigError(
                f"split {self.split!r} gets none of the {task.size} problems of {task.name}, "
                "which are dealt to six splits; give it more problems"
            )
        random.Random(f"rows:{self.seed}").shuffle(rows)
        return sorted(rows[: self.per_task], key=lambda row: row.seed)


def answer_questions(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    questions: QuestionSet,
    *,
    max_tokens: Mapping[str, int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    slots: int = 64,
    context: int | None = None,
    cache: CacheFormat | None = None,
    view: View | None = None,
    mesh: Mesh | None = None,
    skip: Collection[int] = (),
    on_answer: Callable[[int, Trace], None] | None = None,
) -> list[Trace]:
    """Asks the questions.

    Args:
      params, config, chat: the model, with weights in the dtype to compute with.
      questions: what to ask.
      max_tokens: limit per effort.
      temperature, top_p, slots, cache, view, mesh: as in `generate`.
      context: positions of every slot; by default those that a question's own length needs, as in `generate`. One
        number for all compiles one set of programs; rounding, and so an answer now and then, depends on it.
      skip: indices into `questions.questions()` that are not asked.
      on_answer: called with a question's index and its answer as soon as it is there, in any order.

    Returns:
      The answers to what was asked, in the order of the questions.
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

    def finish(position: int, completion: Generated) -> None:
        index, (problem, effort) = asked[position]
        answers[index] = _judge(chat, tasks[problem.task], problem, effort, requests[position], completion)
        if on_answer is not None:
            on_answer(index, answers[index])

    stop_ids = sorted(chat.stop_ids)
    if context is None:
        generate(
            params,
            config,
            requests,
            stop_ids=stop_ids,
            temperature=temperature,
            top_p=top_p,
            slots=slots,
            cache=cache,
            view=view,
            mesh=mesh,
            on_finish=finish,
        )
    else:
        sampling = Sampling(temperature, top_p)
        engine = Engine(
            params,
            config,
            stop_ids=stop_ids,
            context=context,
            slots=slots,
            sampling=sampling,
            cache=cache,
            view=view,
            mesh=mesh,
        )
        engine.generate(requests, finish)
    return [answers[index] for index, _ in asked]


def _judge(chat: Chat, task: Task, problem: Problem, effort: str, request: Request, completion: Generated) -> Trace:
    final = chat.parse(completion.tokens).final
    reward = 0.0 if completion.truncated else task.score(problem, final)
    return Trace(
        problem.task,
        effort,
        problem.seed,
        dict(problem.details),
        request.prompt,
        completion.tokens,
        reward,
        completion.truncated,
    )
