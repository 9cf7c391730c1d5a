"""The speeds that an evaluation reports, measured and saved round by round.

Speed is measured in every scenario of fixed lengths and, for every effort, at the lengths of each model's own answers,
each model at the largest batch that the cache memory holds. The slots of every effort fit the longest request of any
effort, since one server answers them all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from puzzle_jax.codec import from_plain, to_plain
from puzzle_jax.errors import ConfigError, PuzzleError, check_range
from puzzle_jax.evaluate.models import Model, fit_together
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.evaluate.throughput import Workload, fixed_lengths, largest_batch, own_lengths, timed_rounds
from puzzle_jax.files import parse_json, read_bytes
from puzzle_jax.generate.sampling import Sampling
from puzzle_jax.generate.traces import Trace, open_to_append
from puzzle_jax.model.network import compute_dtype

REQUESTS, BATCHES = 192, 6
"""Requests that are timed for an effort, or full batches where this many batches hold more requests."""

Slots = dict[str, tuple[int, int]]
"""Requests that run together and the positions of each, by scenario or effort."""

Speeds = Mapping[str, Mapping[str, Sequence[float]]]
"""Tokens per second by scenario or effort, and by model, one value per round."""


@dataclass(frozen=True)
class Round:
    """A line of throughput.jsonl: generated tokens per second by model, in a scenario or at an effort.

    The key is a hash of everything that the rates depend on except the models.
    """

    key: str
    workload: str
    tokens_per_second: dict[str, float]

    def __post_init__(self) -> None:
        for model, rate in self.tokens_per_second.items():
            check_range(f"tokens_per_second.{model}", rate, 0, above=True)


def plan_slots(model: Model, settings: Settings, longest: int) -> Slots:
    """The batch sizes of a model; a request at any effort may need `longest` positions.

    Raises ConfigError for a scenario beyond the model's context, and for a memory that does not hold a single request.
    """
    wanted = {scenario.name: (f"scenario {scenario.name!r}", scenario.context_tokens) for scenario in settings.lengths}
    wanted |= {effort: (f"effort {effort!r}", longest) for effort in settings.efforts}
    found: Slots = {}
    for name, (what, context) in wanted.items():
        if context > model.config.max_position:
            raise ConfigError(
                f"{what} needs a context of {context} tokens, but that of model {model.name!r} is "
                f"{model.config.max_position}"
            )
        batch = largest_batch(
            model.config,
            context,
            cache_memory=settings.cache_memory,
            cache=model.cache_format(settings.cache_of(model.name)),
            compute=compute_dtype(),
            at_most=settings.max_batch,
            what=f"model {model.name!r}, {what}",
        )
        found[name] = (batch, context)
    return found


def plan_workloads(
    models: Mapping[str, Model],
    slots: Mapping[str, Slots],
    settings: Settings,
    answers: Mapping[str, Sequence[Trace]],
) -> dict[str, dict[str, Workload]]:
    """The workloads, by scenario or effort, and by model."""

    sampling = Sampling(settings.temperature, settings.top_p)
    lengths = {scenario.name: scenario for scenario in settings.lengths}

    def workload(name: str, model: Model) -> Workload:
        batch, context = slots[model.name][name]
        if name in lengths:
            inputs, outputs = lengths[name].input_tokens, lengths[name].output_tokens
            found = fixed_lengths(model.config.vocab_size, batch, inputs, outputs)
        else:
            own_answers = [answer for answer in answers[model.name] if answer.effort == name]
            found = own_lengths(own_answers, batch, max(REQUESTS, BATCHES * batch), context)
        return replace(found, sampling=sampling, cache=model.cache_format(settings.cache_of(model.name)))

    return {
        name: {model: workload(name, opened) for model, opened in models.items()}
        for name in (*lengths, *settings.efforts)
    }


def measure_speeds(
    models: Mapping[str, Model],
    workloads: Mapping[str, Mapping[str, Workload]],
    settings: Settings,
    rounds: int,
    path: Path,
    advance: Callable[[int], None],
) -> Speeds:
    """Runs the rounds that are missing from the file `path`, and appends each as soon as it has run.

    All models take turns within a round where the device holds them together. Where it does not, each runs all of its
    rounds before the next is loaded, so that drift of the device in between favours one of them.

    `advance` is called with the number of runs done, out of `len(workloads) * len(models) * (rounds + 1)`.
    """
    found = {name: _done(_kept(path), _key(name, of, settings), of, rounds, path) for name, of in workloads.items()}
    for done in (rates for by_model in found.values() for rates in by_model.values()):
        advance(len(done) + (len(done) == rounds))
    together = fit_together(models.values(), settings.cache_memory)
    groups = [list(models)] if together else [[name] for name in models]
    with open_to_append(path) as file:
        for names in groups:
            for name, by_model in workloads.items():
                done = found[name]
                first = min(len(done[model]) for model in names)
                if any(len(done[model]) != first for model in names):
                    raise PuzzleError(f"{path} holds rounds of {name!r} without all models; remove the file")
                # Weights are read only where there is something to run.
                weights = {m: (models[m].params, models[m].config) for m in names} if first < rounds else {}
                of_group = {model: by_model[model] for model in names}
                for rates in timed_rounds(weights, of_group, range(first, rounds), on_run=lambda: advance(1)):
                    file.write(json.dumps(to_plain(Round(_key(name, by_model, settings), name, rates))) + "\n")
                    file.flush()
                    for model, rate in rates.items():
                        done[model].append(rate)
                weights.clear()
            if not together:
                models[names[0]].release()
    return found


def _done(kept: Sequence[Round], key: str, models: Collection[str], rounds: int, path: Path) -> dict[str, list[float]]:
    """Tokens per second by model in the rounds of an earlier run."""
    rows = [row.tokens_per_second for row in kept if row.key == key]
    if any(not set(row) <= set(models) for row in rows):
        raise PuzzleError(f"{path} holds rounds of other models; remove the file")
    return {model: [row[model] for row in rows if model in row][:rounds] for model in models}


def device() -> str:
    """A description of the devices in use."""
    first = jax.devices()[0]
    return f"{len(jax.devices())} x {first.device_kind} ({first.platform})"


def _key(name: str, workloads: Mapping[str, Workload], settings: Settings) -> str:
    """A hash of what a speed depends on; the weights are left out, as the evaluation's directory fixes them."""
    content: dict[str, object] = {"name": name, "device": device(), "jax": jax.__version__}
    content |= {key: settings.asked()[key] for key in ("temperature", "top_p", "cache_dtype")}
    if settings.cache_dtypes:
        content["cache_dtypes"] = dict(settings.cache_dtypes)
    for model, workload in workloads.items():
        requests = [[request.prompt, request.max_tokens, request.seed] for request in workload.requests]
        content[f"model {model}"] = [workload.slots, workload.context, requests]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _kept(path: Path) -> list[Round]:
    """The rounds of earlier runs, without an incomplete last line."""
    lines = read_bytes(path).split(b"\n")[:-1] if path.exists() else []
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [from_plain(Round, parse_json(line, where), where) for line, where in zip(lines, places, strict=True)]
