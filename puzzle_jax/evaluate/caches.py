"""The cost of an FP8 KV cache: bfloat16, calibrated e4m3 and uncalibrated e4m3 caches side by side.

    puzzle evaluate caches --model DIR --out DIR

Scales are calibrated on the model's own answers to one set of problems. All three caches are compared on another set:
by the KL divergence of next-token distributions from the bfloat16 cache's, over the answers generated with that cache,
and by accuracy on the same problems with the same seeds. `--amplify n` does this for a copy of the model that computes
the same function with keys and values 2^n times as large, where calibrated scales make the largest difference.
Writes caches.json; scales go into a checkpoint when it is exported (`convert_hf.export`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

from puzzle_jax.codec import to_plain
from puzzle_jax.config import ModelConfig
from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import ConfigError, check_range
from puzzle_jax.evaluate.accuracy import QuestionSet, answer_questions, check_context, unscored_note
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.evaluate.models import Model
from puzzle_jax.evaluate.settings import Asked
from puzzle_jax.evaluate.statistics import Paired, by_effort, paired, resample
from puzzle_jax.files import write_beside
from puzzle_jax.generate.batches import MicroBatch, micro_batches
from puzzle_jax.generate.calibrate import calibrate_cache
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import FLOAT8, CacheFormat, KVScales
from puzzle_jax.model.network import hidden_states
from puzzle_jax.model.schedule import jit_layers
from puzzle_jax.model.spec import Params
from puzzle_jax.tasks import Chat

_DRAWS = 2000  # bootstrap draws
_MOST_AMPLIFIED = 60  # keeps keys, values and the compensating weights within float32
REFERENCE, CALIBRATED, UNCALIBRATED = "bfloat16", "e4m3, calibrated", "e4m3, no scales"


@dataclass(frozen=True)
class CacheResult:
    """One cache compared with the bfloat16 cache.

    Attributes:
      kl: mean over answers of the mean KL per token, in nats; 0 for the reference itself.
      agreement: share of positions at which both rank the same token first.
      accuracy, change: accuracy by effort, and its difference from the reference's on the same problems.
      unscored: a sentence on the answers that could not be scored; None where all were scored.
    """

    kl: float
    agreement: float
    accuracy: dict[str, float]
    change: dict[str, Paired]
    unscored: str | None = None


@dataclass(frozen=True, kw_only=True)
class CachesSettings(Asked):
    """One comparison of caches.

    Attributes:
      model: a checkpoint directory.
      out: directory for caches.json.
      problems: number of problems per effort, split evenly over the tasks.
      amplify: exponent of the power of two by which keys and values are enlarged.
    """

    model: Path
    out: Path
    problems: int = 500
    temperature: float = 0.0
    amplify: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("amplify", self.amplify, -_MOST_AMPLIFIED, _MOST_AMPLIFIED)


def compare_caches(
    params: Params,
    config: ModelConfig,
    chat: Chat,
    *,
    calibration: QuestionSet,
    questions: QuestionSet,
    max_tokens: Mapping[str, int],
    slots: int = 64,
    temperature: float = 0.0,
) -> tuple[dict[str, CacheResult], KVScales]:
    """Results by name of the cache, the reference first, and the calibrated scales.

    The scales come from answers to the problems of `calibration`, which should be from another split than `questions`.
    """
    reference = CacheFormat("bfloat16")
    ask = partial(answer_questions, params, config, chat, max_tokens=max_tokens, slots=slots, temperature=temperature)
    scales = calibrate_cache(params, config, micro_batches(ask(calibration, cache=reference)))
    formats = {REFERENCE: reference, CALIBRATED: CacheFormat(FLOAT8, scales), UNCALIBRATED: CacheFormat(FLOAT8)}
    answers = {name: ask(questions, cache=form) for name, form in formats.items()}
    batches = micro_batches(answers[REFERENCE])
    return {
        name: CacheResult(
            *_distance(params, config, batches, reference, form),
            accuracy={effort: found.accuracy for effort, found in by_effort(answers[name], questions.efforts).items()},
            change={effort: _change(answers, name, effort) for effort in questions.efforts},
            unscored=unscored_note(answers[name]),
        )
        for name, form in formats.items()
    }, scales


def amplify(params: Params, power: int) -> Params:
    """A copy that computes the same function with keys and values 2^power times as large.

    Queries and the output projection shrink by the same factor; scaling by a power of two does not round.
    """
    factor = 2.0**power
    layers = []
    for layer in params["layers"]:
        attention = dict(layer["attention"])
        for kind, by in (("q", 1 / factor), ("k", factor), ("v", factor)):
            for name in (f"{kind}_weight", f"{kind}_bias"):
                attention[name] = attention[name] * by
        attention["o_weight"] = attention["o_weight"] / factor
        layers.append({**layer, "attention": attention})
    return {**params, "layers": layers}


def _change(answers: Mapping[str, Sequence[Trace]], name: str, effort: str) -> Paired:
    ours, others = ([answer for answer in answers[key] if answer.effort == effort] for key in (name, REFERENCE))
    model, reference = (np.asarray([answer.correct for answer in found]) for found in (ours, others))
    return paired(model, reference, resample([answer.task for answer in ours], _DRAWS, seed=0))


def _distance(
    params: Params, config: ModelConfig, batches: Sequence[MicroBatch], reference: CacheFormat, form: CacheFormat
) -> tuple[float, float]:
    """KL and agreement, as means over all answers."""
    totals, count = np.zeros(2), 0
    for batch in batches:
        totals += np.asarray(_compare(params, config, batch, reference, form)).sum(axis=1)
        count += int((np.asarray(batch.lengths) > 0).sum())
    return float(totals[0] / count), float(totals[1] / count)


@jit_layers(static_argnames="config")
def _compare(
    params: Params, config: ModelConfig, batch: MicroBatch, reference: CacheFormat, form: CacheFormat
) -> Float[Array, "2 rows"]:
    """KL and agreement of each trace, as means over its completion."""
    exact, rough = (hidden_states(params, config, batch.tokens, cache=cache)[0] for cache in (reference, form))
    apart = divergence(params, config, exact, rough)
    return jnp.stack([jnp.sum(part * batch.loss_weight, axis=-1) for part in (apart.kl, apart.agreement)])


def run(settings: CachesSettings) -> None:
    """Compares the caches, prints a table and writes caches.json."""
    tasks, efforts = settings.tasks, settings.efforts
    each = -(-settings.problems // len(tasks))
    questions = QuestionSet(tasks, efforts, each, "evaluation", settings.seed)
    calibration = QuestionSet(tasks, efforts, max(1, each // 4), "calibration", settings.seed)
    if settings.out.exists() and not settings.out.is_dir():
        raise ConfigError(f"out is {settings.out}, which is a file, but must be a directory")
    model = Model.open(str(settings.model), settings.model)
    for asked in (questions, calibration):
        check_context(asked.questions(), model.chat, model.config, settings.max_tokens, f"model {model.name!r}")
    results, scales = compare_caches(
        amplify(model.params, settings.amplify) if settings.amplify else model.params,
        model.config,
        model.chat,
        calibration=calibration,
        questions=questions,
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": str(settings.model),
        "amplify": settings.amplify,
        "problems_per_effort": each * len(tasks),
        "caches": results,
        "scales": {"k": np.asarray(scales.k), "v": np.asarray(scales.v)},
    }
    write_beside(settings.out / "caches.json", (json.dumps(to_plain(record), indent=1) + "\n").encode())
    _print(results, efforts)


def _print(results: Mapping[str, CacheResult], efforts: Sequence[str]) -> None:
    table = Table("cache", "KL, nats per token", "same first token", *(f"accuracy, {effort}" for effort in efforts))
    for name, result in results.items():
        cells = [name, f"{result.kl:.2e}", f"{result.agreement:.1%}"]
        for effort in efforts:
            change = result.change[effort]
            paired = "" if name == REFERENCE else f" ({change.difference:+.1%}, {change.won} won, {change.lost} lost)"
            cells.append(f"{result.accuracy[effort]:.1%}{paired}")
        table.add_row(*cells)
    console = plain_console(width=170)
    console.print(table)
    for name, result in results.items():
        if result.unscored:
            console.print(f"{name}: {result.unscored}", highlight=False, soft_wrap=True)
