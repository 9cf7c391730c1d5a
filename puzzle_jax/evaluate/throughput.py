"""Measured throughput: generated tokens per second of models that take turns on the same devices.

The generation engine itself is timed, on requests that each run to their own limit, whatever tokens come out. In every
round each model runs once, in an order that rotates by one, so that a machine that drifts or warms up favours no model,
and ratios are formed round by round. All requests are queued from the start: prompts are prefilled as slots become
free, and the clock stops when the last request is done.

Memory is part of a deployment: a `Workload` runs as many requests together as their caches fit into a given number
of bytes, so a child with smaller caches runs a larger batch.

Left out: requests that arrive over time, latencies, weights in the memory limit, and several devices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.engine import Engine, Request, slot_context
from puzzle_jax.generate.sampling import Sampling
from puzzle_jax.generate.traces import Trace
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.spec import Params

Weights = tuple[Params, ModelConfig]


@dataclass(frozen=True)
class Workload:
    """The requests that one model runs in a round.

    Attributes:
      requests: each generates exactly its limit of tokens.
      slots: requests that run together.
      context: positions that a slot holds.
      sampling, cache: as in `generate.Engine`.
    """

    requests: tuple[Request, ...]
    slots: int
    context: int
    sampling: Sampling = field(default_factory=Sampling)
    cache: CacheFormat = field(default_factory=CacheFormat)

    @property
    def tokens(self) -> int:
        """Generated tokens of a round."""
        return sum(request.max_tokens for request in self.requests)


def largest_batch(
    config: ModelConfig,
    context: int,
    *,
    cache_memory: int,
    cache: CacheFormat,
    compute: np.dtype | type,
    at_most: int,
    what: str,
) -> int:
    """The number of requests of `context` positions whose caches, in the format `cache` of a model that computes in
    `compute`, fit into `cache_memory` bytes together, but no more than `at_most`.

    Raises ConfigError, which begins with `what`, when not even one fits.
    """
    needed = cache.cache_bytes(config, slot_context(context), compute)
    if needed > cache_memory:
        raise ConfigError(
            f"{what}: one request of {context} tokens needs {needed:,} bytes of cache, "
            f"but the cache memory is {cache_memory:,}"
        )
    return min(at_most, cache_memory // needed)


def fixed_lengths(vocab_size: int, slots: int, input_tokens: int, output_tokens: int, seed: int = 0) -> Workload:
    """`slots` requests of random tokens, all of one length."""
    prompts = np.random.default_rng(seed).integers(0, vocab_size, (slots, input_tokens)).tolist()
    requests = tuple(Request(tuple(prompt), output_tokens, seed) for prompt in prompts)
    return Workload(requests, slots, input_tokens + output_tokens)


def own_lengths(answers: Sequence[Trace], slots: int, count: int, context: int, seed: int = 0) -> Workload:
    """`count` requests with prompts that a model was given, each generating as many tokens as the model's answer had.

    They are spread evenly over the answers in order of length, so that a few represent all, and then shuffled.
    """
    ordered = sorted(answers, key=lambda answer: (len(answer.completion), len(answer.prompt)))
    drawn = [ordered[int((index + 0.5) * len(ordered) / count)] for index in range(count)]
    order = np.random.default_rng(seed).permutation(count)
    requests = tuple(Request(drawn[i].prompt, len(drawn[i].completion), seed + int(i)) for i in order)
    return Workload(requests, slots, context)


def timed_rounds(
    models: Mapping[str, Weights],
    workloads: Mapping[str, Workload],
    rounds: range,
    *,
    on_run: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, float]]:
    """Tokens per second of every model, round after round; before the first round, every model compiles by running a
    first batch of requests.

    Args:
      models, workloads: parameters with configuration, and requests, by the same names.
      rounds: numbers of the rounds to run.
      on_run: called after every run of a model, those that compile included.
      clock: returns seconds; on a shared machine, `time.process_time` counts only the process's own work.
    """
    names = list(models)
    for name in names if len(rounds) else ():
        first = replace(workloads[name], requests=workloads[name].requests[: workloads[name].slots])
        _seconds(models[name], first, clock)
        if on_run is not None:
            on_run()
    for number in rounds:
        rates = {}
        for turn in range(len(names)):
            name = names[(turn + number) % len(names)]
            rates[name] = workloads[name].tokens / _seconds(models[name], workloads[name], clock)
            if on_run is not None:
                on_run()
        yield {name: rates[name] for name in names}


def _seconds(model: Weights, workload: Workload, clock: Callable[[], float]) -> float:
    params, config = model
    engine = Engine(
        params,
        config,
        stop_ids=(),
        context=workload.context,
        slots=workload.slots,
        sampling=workload.sampling,
        cache=workload.cache,
    )
    start = clock()
    engine.generate(workload.requests)
    return clock() - start


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds; with fewer than four rounds, the extremes in place of quartiles."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        low, high = (min(values), max(values)) if len(values) < 4 else statistics.quantiles(values, n=4)[::2]
        return Spread(statistics.median(values), low, high, len(values))


def measure_throughput(
    models: Mapping[str, Weights],
    *,
    batch: int | Mapping[str, int],
    input_tokens: int,
    output_tokens: int,
    rounds: int = 5,
    sampling: Sampling | None = None,
    on_round: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Spread]:
    """Generated tokens per second of every model on a batch of requests of one length.

    Args:
      models: parameters and configuration by name.
      batch: requests that run together, the same for all or by model.
      input_tokens, output_tokens: length of every prompt and of every answer.
      rounds, on_round: number of timed rounds, and a function that is called after each.
      sampling: None means greedy, with which a model of random weights soon repeats one token.
      clock: see `timed_rounds`.
    """
    workloads = {
        name: replace(
            fixed_lengths(
                config.vocab_size, batch if isinstance(batch, int) else batch[name], input_tokens, output_tokens
            ),
            sampling=sampling or Sampling(),
        )
        for name, (_, config) in models.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in models}
    for row in timed_rounds(models, workloads, range(rounds), clock=clock):
        for name, rate in row.items():
            rates[name].append(rate)
        if on_round is not None:
            on_round()
    return {name: Spread.of(values) for name, values in rates.items()}
