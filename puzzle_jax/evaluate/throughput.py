"""Measured throughput: models side by side on the same devices, in turns, so that a drifting machine harms no one.

One round of a model is a prefill of the scenario's prompts and the decoding of its output; tokens per second are
generated tokens over the seconds of both. Left out: the largest batch that fits, and lengths that differ by request.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.cache import LayerCache, decode_step, prefill
from puzzle_jax.model.spec import Params


@dataclass(frozen=True)
class Throughput:
    """Seconds of every round, and medians.

    Attributes:
      tokens_per_second: generated tokens over prefill and decode seconds, median over rounds.
      prefill_seconds, decode_seconds: medians; decoding of all output tokens.
      low, high: quartiles of tokens per second.
    """

    tokens_per_second: float
    low: float
    high: float
    prefill_seconds: float
    decode_seconds: float
    rounds: int


def measure_throughput(
    models: Mapping[str, tuple[Params, ModelConfig]],
    *,
    batch: int,
    input_tokens: int,
    output_tokens: int,
    rounds: int = 5,
    on_round: Callable[[], None] | None = None,
) -> dict[str, Throughput]:
    """Runs each model once per round, in turns.

    Args:
      models: dense parameters and configuration by name.
      batch: requests that run together.
      input_tokens, output_tokens: length of every prompt and of every answer.
      rounds: counted rounds, after one that compiles.
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_index in range(rounds + 1):
        for name, (params, config) in models.items():
            tokens = jax.random.randint(jax.random.key(round_index), (batch, input_tokens), 0, config.vocab_size)
            spent = _one_round(params, config, tokens, output_tokens)
            if round_index:
                seconds[name].append(spent)
        if on_round is not None:
            on_round()
    return {name: summary(rows, batch * output_tokens) for name, rows in seconds.items()}


def _one_round(
    params: Params, config: ModelConfig, tokens: Int[Array, "batch seq"], output_tokens: int
) -> tuple[float, float]:
    start = time.perf_counter()
    logits, caches = jax.block_until_ready(_prefill(params, config, tokens, tokens.shape[1] + output_tokens))
    middle = time.perf_counter()
    jax.block_until_ready(_decode(params, config, logits, caches, tokens.shape[1], output_tokens))
    return middle - start, time.perf_counter() - middle


@partial(jax.jit, static_argnames=("config", "context"))
def _prefill(
    params: Params, config: ModelConfig, tokens: Int[Array, "batch seq"], context: int
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    return prefill(params, config, tokens, lengths, context)


@partial(jax.jit, static_argnames=("config", "output_tokens"))
def _decode(
    params: Params,
    config: ModelConfig,
    logits: Float[Array, "batch vocab"],
    caches: list[LayerCache],
    first: int | Int[Array, ""],
    output_tokens: int,
) -> Float[Array, "batch vocab"]:
    """Greedy decoding of a fixed number of tokens."""

    def step(index: Array, state: tuple[Array, list[LayerCache]]) -> tuple[Array, list[LayerCache]]:
        logits, caches = state
        positions = jnp.full(logits.shape[0], first + index, jnp.int32)
        return decode_step(params, config, caches, jnp.argmax(logits, axis=-1), positions)

    return jax.lax.fori_loop(0, output_tokens, step, (logits, caches))[0]


def summary(rows: list[tuple[float, float]], tokens: int) -> Throughput:
    """Throughput of rounds of (prefill, decode) seconds, each of which generates `tokens`."""
    rates = sorted(tokens / (prefill + decode) for prefill, decode in rows)
    low, high = (rates[0], rates[-1]) if len(rates) < 4 else statistics.quantiles(rates, n=4)[::2]
    return Throughput(
        tokens_per_second=statistics.median(rates),
        low=low,
        high=high,
        prefill_seconds=statistics.median(prefill for prefill, _ in rows),
        decode_seconds=statistics.median(decode for _, decode in rows),
        rounds=len(rows),
    )
