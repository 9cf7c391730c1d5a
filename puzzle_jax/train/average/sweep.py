"""Which weight to average two policies with: every one answers the same problems, and a rule chooses.

The rule: of the weights whose answers are on average no longer than the reference's, those within one standard error of
the highest accuracy, and of these the one with the shortest answers. Accuracy and tokens are means over problems and
efforts. The standard error is that of the difference to the most accurate weight on the same problems, bootstrapped as
in `evaluate.statistics`. Without a reference no answer is too long. Where all weights' answers are longer than the
reference's, the shortest are taken.

Problems come from the split "confirmation", which training and the choice of its checkpoints do not see.
Left out: meshes, and weights between those that are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.statistics import means, resample
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.network import compute_dtype, to_compute
from puzzle_jax.model.spec import Params
from puzzle_jax.progress import progress
from puzzle_jax.tasks import Chat
from puzzle_jax.train.average.weights import Pair, check_weight

SPLIT = "confirmation"
REFERENCE = "reference"
_DRAWS, _DRAW_SEED = 2000, 0

_dense = jax.jit(to_compute, static_argnums=1)


@dataclass(frozen=True)
class Measured:
    """A model's answers.

    Attributes:
      correct: whether each is right.
      tokens: generated ones of each.
    """

    correct: Bool[np.ndarray, "efforts problems"]
    tokens: Int[np.ndarray, "efforts problems"]

    @staticmethod
    def of(answers: Sequence[Trace], efforts: Sequence[str]) -> Measured:
        by_effort = [[answer for answer in answers if answer.effort == effort] for effort in efforts]
        return Measured(
            np.array([[answer.correct for answer in chosen] for chosen in by_effort], bool),
            np.array([[len(answer.completion) for answer in chosen] for chosen in by_effort], np.int64),
        )

    @property
    def accuracy(self) -> float:
        """The mean over efforts."""
        return float(self.correct.mean())

    @property
    def mean_tokens(self) -> float:
        """The mean over efforts."""
        return float(self.tokens.mean())

    def record(self, efforts: Sequence[str]) -> dict[str, Any]:
        """All figures as JSON values."""
        by_effort = zip(efforts, self.correct.mean(1).tolist(), self.tokens.mean(1).tolist(), strict=True)
        return {
            "accuracy": self.accuracy,
            "tokens": self.mean_tokens,
            "efforts": {effort: {"accuracy": right, "tokens": tokens} for effort, right, tokens in by_effort},
        }


@dataclass(frozen=True)
class Choice:
    """The weight to take, and why."""

    weight: float
    why: str


def choose(points: Mapping[float, Measured], tasks: Sequence[str], limit: float | None) -> Choice:
    """The best point of the frontier of accuracy and tokens, by the rule above.

    Args:
      points: what every weight answered to the same problems.
      tasks: the task of every problem.
      limit: mean tokens that an answer may have; None for any number.
    """

    def shortness(weight: float) -> tuple[float, float]:
        return points[weight].mean_tokens, -points[weight].accuracy

    allowed = [weight for weight, point in points.items() if limit is None or point.mean_tokens <= limit]
    if not allowed:
        why = f"the fewest tokens, since no weight has at most the reference's {limit:.1f}"
        return Choice(min(points, key=shortness), why)
    best = min(allowed, key=lambda weight: (-points[weight].accuracy, points[weight].mean_tokens))
    counts = resample(tasks, _DRAWS, _DRAW_SEED)

    def close(weight: float) -> bool:
        lost = points[best].correct.mean(0) - points[weight].correct.mean(0)
        return float(lost.mean()) <= float(means(counts, lost).std())

    chosen = min(filter(close, allowed), key=shortness)
    if chosen == best:
        return Choice(best, "the highest accuracy" + ("" if limit is None else f" with at most {limit:.1f} tokens"))
    return Choice(chosen, f"the fewest tokens within one standard error of the accuracy of weight {best:g}")


@dataclass(frozen=True)
class Sweep:
    """What is asked of which weights.

    Attributes:
      weights: of B, rising.
      questions: of the split "confirmation".
      limits: tokens of an answer by effort.
      slots: answers generated together.
      chat: of A.
      reference: the model that tokens are compared with.
      temperature: of sampling; 0 is greedy.

    Raises ConfigError for weights that are none or come twice, and for questions that no context holds.
    """

    weights: tuple[float, ...]
    questions: QuestionSet
    limits: Mapping[str, int]
    slots: int
    chat: Chat
    reference: Model | None
    temperature: float = 0.0

    @staticmethod
    def open(
        pair: Pair,
        weights: Sequence[float],
        questions: QuestionSet,
        limits: Mapping[str, int],
        slots: int,
        reference: Path | None,
        temperature: float = 0.0,
    ) -> Sweep:
        """Reads chat files and the reference's headers, and checks everything against everything."""
        for weight in weights:
            check_weight("weights", weight)
        if len(set(weights)) < len(weights):
            raise ConfigError(f"weights is {','.join(map('{:g}'.format, weights))}, but must name each once")
        chat = Chat.load(pair.ours.directory)
        model = None if reference is None else Model.open(REFERENCE, reference, chat.today)
        sweep = Sweep(tuple(sorted(weights)), questions, limits, slots, chat, model, temperature)
        sweep.check_context(chat, pair.ours.config, "A and B")
        if model is not None:
            sweep.check_context(model.chat, model.config, f"the reference {reference}")
        return sweep

    def check_context(self, chat: Chat, config: ModelConfig, who: str) -> None:
        """Raises ConfigError where a question with its longest answer is more than a model reads."""
        check_context(self.questions.questions(), chat, config, self.limits, who)

    def answers(self, params: Params, config: ModelConfig, chat: Chat, who: str, console: Console) -> Measured:
        """What a model answers."""
        dense = _dense(params, compute_dtype())
        with progress(console, f"answering, {who}", len(self.questions.questions())) as advance:
            found = answer_questions(
                dense,
                config,
                chat,
                self.questions,
                max_tokens=self.limits,
                temperature=self.temperature,
                slots=self.slots,
                on_answer=lambda *_: advance(1),
            )
        if note := unscored_note(found):
            console.print(f"{who}: {note}", highlight=False, soft_wrap=True)
        return Measured.of(found, self.questions.efforts)


@dataclass(frozen=True)
class Swept:
    """What a sweep found.

    Attributes:
      sweep: what was asked.
      points: by weight.
      reference: its answers, where there is one.
      choice: the weight to take.
    """

    sweep: Sweep
    points: Mapping[float, Measured]
    reference: Measured | None
    choice: Choice

    def record(self) -> dict[str, Any]:
        """For provenance.json."""
        questions, model = self.sweep.questions, self.sweep.reference
        record: dict[str, Any] = {
            "split": questions.split,
            "tasks": list(questions.tasks),
            "judged_by": questions.task_identities,
            "problems": questions.per_task,
            "seed": questions.seed,
            "temperature": self.sweep.temperature,
            "max_tokens": {effort: self.sweep.limits[effort] for effort in questions.efforts},
            "points": [{"weight": w, **point.record(questions.efforts)} for w, point in self.points.items()],
            "chosen": self.choice.weight,
            "why": self.choice.why,
        }
        if model is not None and self.reference is not None:
            directory = str(model.description.directory)
            record[REFERENCE] = {"model": directory, **self.reference.record(questions.efforts)}
        return record

    def table(self) -> Table:
        """Accuracy and mean tokens for people, by effort and over all."""
        efforts, reference = self.sweep.questions.efforts, self.reference
        columns = ["weight", *efforts, "all efforts", *(() if reference is None else ("of reference",))]
        table = Table(*columns, title="accuracy / mean tokens")
        rows = {f"{weight:g}": point for weight, point in self.points.items()}
        for name, point in (rows if reference is None else {**rows, REFERENCE: reference}).items():
            by_effort = zip(point.correct.mean(1), point.tokens.mean(1), strict=True)
            pairs = [*by_effort, (point.accuracy, point.mean_tokens)]
            cells = [f"{right:.1%} / {tokens:.1f}" for right, tokens in pairs]
            if reference is not None:
                accuracy = f"{point.accuracy / reference.accuracy:.1%}" if reference.accuracy else "-"
                cells.append(f"{accuracy} / {point.mean_tokens / reference.mean_tokens:.1%}")
            table.add_row(name, *cells)
        return table


def run_sweep(pair: Pair, sweep: Sweep, console: Console) -> Swept:
    """Asks the reference and every weight's average, one after the other, and chooses."""
    reference = None
    if (model := sweep.reference) is not None:
        loaded = load_checkpoint(model.description.directory).params
        reference = sweep.answers(loaded, model.config, model.chat, REFERENCE, console)
        del loaded  # before A comes
    loaded, config = load_checkpoint(pair.ours.directory).params, pair.ours.config
    points = {
        weight: sweep.answers(pair.params(loaded, weight), config, sweep.chat, f"{weight:g}", console)
        for weight in sweep.weights
    }
    questions = sweep.questions
    tasks = [problem.task for problem, effort in questions.questions() if effort == questions.efforts[0]]
    limit = None if reference is None else reference.mean_tokens
    return Swept(sweep, points, reference, choose(points, tasks, limit))
