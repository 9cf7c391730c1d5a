"""Choice of the weight to average two policies with: every average answers the same problems, and a rule chooses.

The rule: of the weights whose answers are on average no longer than the reference's, take those within one standard
error of the highest accuracy, and of these the one with the shortest answers. Accuracy and tokens are means over
problems and efforts. The standard error is that of the difference to the most accurate weight on the same problems,
bootstrapped as in `evaluate.statistics`. Without a reference there is no limit. Where the answers of all weights are
longer than the reference's, the weight with the shortest answers is taken.

The scales of the chosen average's FP8 cache are calibrated on its own answers.

Problems come from the split "confirmation", which training and the choice of its checkpoints do not see.
Left out: meshes, and weights between those that are named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.errors import ConfigError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.statistics import Summary, by_effort, means, resample, summarise
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.network import compute_dtype, to_compute
from puzzle_jax.model.spec import Params
from puzzle_jax.model.weights import stays_packed
from puzzle_jax.progress import progress
from puzzle_jax.tasks import Chat
from puzzle_jax.train.average.weights import Pair

SPLIT = "confirmation"
CALIBRATION_ANSWERS = 256
"""Approximate number of answers on which the scales of the chosen average's FP8 cache are calibrated."""
REFERENCE = "reference"
_DRAWS, _DRAW_SEED = 2000, 0

_dense = jax.jit(to_compute, static_argnums=1)


def _in_compute_form(params: Params, config: ModelConfig) -> Params:
    """Parameters in the form that models run with: dense, or as stored where dense ones would need too much memory."""
    packed, dtype = any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed))), compute_dtype()
    if stays_packed("auto", config, packed, dtype=dtype):
        return {**params, "final_norm": params["final_norm"].astype(dtype)}
    return _dense(params, dtype)


def _is_packed(node: object) -> bool:
    return isinstance(node, MXFP4)


@dataclass(frozen=True)
class Measured:
    """Summary of a model's answers.

    Attributes:
      overall: summary at all efforts.
      by_effort: summary at each effort.
      correct: share of the efforts at which each problem was answered correctly.
    """

    overall: Summary
    by_effort: Mapping[str, Summary]
    correct: Float[np.ndarray, "problems"]

    @staticmethod
    def of(answers: Sequence[Trace], efforts: Sequence[str]) -> Measured:
        correct = [[answer.correct for answer in answers if answer.effort == effort] for effort in efforts]
        return Measured(summarise(answers), by_effort(answers, efforts), np.mean(correct, axis=0))

    def record(self) -> Mapping[str, object]:
        """All figures as JSON values."""

        def figures(summary: Summary) -> dict[str, float]:
            return {"accuracy": summary.accuracy, "tokens": summary.mean_tokens}

        return figures(self.overall) | {"efforts": {effort: figures(of) for effort, of in self.by_effort.items()}}


@dataclass(frozen=True)
class Choice:
    """The chosen weight, and the reason for it."""

    weight: float
    why: str


def choose(points: Mapping[float, Measured], tasks: Sequence[str], limit: float | None) -> Choice:
    """Chooses a point on the frontier of accuracy and tokens, by the rule above.

    Args:
      points: summary of every weight's answers to the same problems.
      tasks: the task of every problem.
      limit: largest allowed mean of tokens per answer; None for no limit.
    """

    overall = {weight: point.overall for weight, point in points.items()}

    def shortness(weight: float) -> tuple[float, float]:
        return overall[weight].mean_tokens, -overall[weight].accuracy

    allowed = [weight for weight, summary in overall.items() if limit is None or summary.mean_tokens <= limit]
    if not allowed:
        why = f"the fewest tokens, since no weight has at most the reference's {limit:.1f}"
        return Choice(min(overall, key=shortness), why)
    best = min(allowed, key=lambda weight: (-overall[weight].accuracy, overall[weight].mean_tokens))
    counts = resample(tasks, _DRAWS, _DRAW_SEED)

    def close(weight: float) -> bool:
        lost = points[best].correct - points[weight].correct
        return float(lost.mean()) <= float(means(counts, lost).std())

    chosen = min(filter(close, allowed), key=shortness)
    if chosen == best:
        return Choice(best, "the highest accuracy" + ("" if limit is None else f" with at most {limit:.1f} tokens"))
    return Choice(chosen, f"the fewest tokens within one standard error of the accuracy of weight {best:g}")


@dataclass(frozen=True)
class Sweep:
    """The weights to compare and the questions that they are asked.

    Attributes:
      weights: weights of B, in ascending order.
      limits: token limit of an answer by effort.
      slots: number of answers generated together.
      chat: chat format of A.
      reference: the model that tokens are compared with.

    Raises ConfigError for weights outside 0 to 1 or given twice, and for questions that do not fit a model's context.
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
        """Reads chat files and the reference's headers, and checks that all inputs fit together."""
        for weight in weights:
            check_range("weights", weight, 0, 1)
        if len(set(weights)) < len(weights):
            raise ConfigError(f"weights is {','.join(map('{:g}'.format, weights))}, but must name each once")
        chat = Chat.load(pair.ours.directory)
        model = None if reference is None else Model.open(REFERENCE, reference, chat.today)
        sweep = Sweep(tuple(sorted(weights)), questions, limits, slots, chat, model, temperature)
        asked = questions.questions()
        check_context(asked, chat, pair.ours.config, limits, "A and B")
        if model is not None:
            check_context(asked, model.chat, model.config, limits, f"the reference {reference}")
        return sweep

    def answers(self, params: Params, config: ModelConfig, chat: Chat, who: str, console: Console) -> list[Trace]:
        """A model's answers to all questions."""
        params = _in_compute_form(params, config)
        with progress(console, f"answering, {who}", len(self.questions.questions())) as advance:
            found = answer_questions(
                params,
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
        return found


@dataclass(frozen=True)
class Swept:
    """Summaries of the answers of every weight of a sweep, and of the reference where there is one; the choice, and the
    scales of the chosen average's FP8 cache."""

    sweep: Sweep
    points: Mapping[float, Measured]
    reference: Measured | None
    choice: Choice
    scales: KVScales

    def record(self) -> dict[str, object]:
        """The sweep's record in provenance.json."""
        questions, model = self.sweep.questions, self.sweep.reference
        record: dict[str, object] = {
            "split": questions.split,
            "tasks": list(questions.tasks),
            "judged_by": questions.task_identities,
            "problems": questions.per_task,
            "seed": questions.seed,
            "temperature": self.sweep.temperature,
            "max_tokens": {effort: self.sweep.limits[effort] for effort in questions.efforts},
            "points": [{"weight": w, **point.record()} for w, point in self.points.items()],
            "chosen": self.choice.weight,
            "why": self.choice.why,
        }
        if model is not None and self.reference is not None:
            directory = str(model.description.directory)
            record[REFERENCE] = {"model": directory, **self.reference.record()}
        return record

    def table(self) -> Table:
        """A table of accuracy and mean tokens, by effort and over all."""
        efforts, reference = self.sweep.questions.efforts, self.reference
        columns = ["weight", *efforts, "all efforts", *(() if reference is None else ("of reference",))]
        table = Table(*columns, title="accuracy / mean tokens")
        rows = {f"{weight:g}": point for weight, point in self.points.items()}
        for name, point in (rows if reference is None else {**rows, REFERENCE: reference}).items():
            summaries = [*point.by_effort.values(), point.overall]
            cells = [f"{summary.accuracy:.1%} / {summary.mean_tokens:.1f}" for summary in summaries]
            if reference is not None:
                own, theirs = point.overall, reference.overall
                accuracy = f"{own.accuracy / theirs.accuracy:.1%}" if theirs.accuracy else "-"
                cells.append(f"{accuracy} / {own.mean_tokens / theirs.mean_tokens:.1%}")
            table.add_row(name, *cells)
        return table


def run_sweep(pair: Pair, sweep: Sweep, console: Console) -> Swept:
    """Asks the reference and every weight's average in turn, chooses a weight, and calibrates its average's cache."""
    questions = sweep.questions
    reference = None
    if (model := sweep.reference) is not None:
        loaded = load_checkpoint(model.description.directory).params
        answers = sweep.answers(loaded, model.config, model.chat, REFERENCE, console)
        reference = Measured.of(answers, questions.efforts)
        del loaded  # before A is loaded
    loaded, config = load_checkpoint(pair.ours.directory).params, pair.ours.config
    answered = {
        weight: sweep.answers(pair.params(loaded, weight), config, sweep.chat, f"{weight:g}", console)
        for weight in sweep.weights
    }
    points = {weight: Measured.of(found, questions.efforts) for weight, found in answered.items()}
    tasks = [problem.task for problem, effort in questions.questions() if effort == questions.efforts[0]]
    limit = None if reference is None else reference.overall.mean_tokens
    choice = choose(points, tasks, limit)
    some = answered[choice.weight][:: max(1, len(answered[choice.weight]) // CALIBRATION_ANSWERS)]
    params = _in_compute_form(pair.params(loaded, choice.weight), config)
    return Swept(sweep, points, reference, choice, calibrate_cache(params, config, micro_batches(some)))
