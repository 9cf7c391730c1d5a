"""Batched, cached generation: what tracing and accuracy need.

Requests are grouped by the size of their prompt, run in batches of fixed shape (so few programs are
compiled), prefilled together, and decoded in one loop on the device until every row has stopped. A view runs a
child on its parent's weights and programs. Every request has its own seed, and rows do not interact.

Left out: refilling finished rows while others run, quantised caches, and streaming.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.cache import LayerCache, decode_step, prefill
from puzzle_jax.model.child import View
from puzzle_jax.model.spec import Params

PROMPT_BUCKET, PROMPT_STEP = 64, 256  # prompts are padded to a power of two, beyond the step to a multiple of it
LIMIT_BUCKET = 32  # the largest token limit is rounded up to a multiple, for the size of caches


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
      prompt: token ids, at least one.
      max_tokens: tokens to generate at most, at least one.
      seed: of the sampling noise; ignored at temperature 0.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    seed: int = 0


@dataclass(frozen=True)
class Generated:
    """A completion; `tokens` ends in a stop id unless it is `truncated`."""

    tokens: tuple[int, ...]
    truncated: bool


def generate(
    params: Params,
    config: ModelConfig,
    requests: Sequence[Request],
    *,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    batch_size: int = 64,
    view: View | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Completes every request.

    Args:
      params: dense parameters in the dtype to compute with (`network.to_compute`).
      config: the model of `params`.
      requests: in any order; answers come back in the same order.
      stop_ids: tokens that end a completion; they are part of it.
      temperature: 0 is greedy.
      batch_size: rows that run together; the last batch of a group is padded.
      view: runs a child of the model (`Child.view`).
      on_batch: called after every batch with the number of requests that it completed.

    Raises:
      PuzzleError: an empty prompt, a limit below 1, or a prompt that with its limit exceeds the model's context.
    """
    if not stop_ids:
        raise PuzzleError("stop_ids is empty, so that no completion could end")
    groups: dict[int, list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        _check(request, index, config.max_position)
        groups[_padded_length(len(request.prompt))].append(index)
    limit = -(-max((r.max_tokens for r in requests), default=1) // LIMIT_BUCKET) * LIMIT_BUCKET
    results: dict[int, Generated] = {}
    stops = jnp.asarray(sorted(stop_ids), jnp.int32)
    for length, members in sorted(groups.items()):
        members.sort(key=lambda index: requests[index].max_tokens)  # rows of a batch end at about the same time
        for start in range(0, len(members), batch_size):
            batch = members[start : start + batch_size]
            rows = _batch([requests[i] for i in batch], length, batch_size)
            logits, caches = _prefill(params, config, rows, length + limit, view)
            tokens, counts = _decode(params, config, rows, logits, caches, stops, temperature, limit, view)
            tokens, counts = np.asarray(tokens), np.asarray(counts)
            for row, index in enumerate(batch):
                ids = tuple(int(t) for t in tokens[row, : counts[row]])
                results[index] = Generated(ids, truncated=ids[-1] not in stop_ids)
            if on_batch is not None:
                on_batch(len(batch))
    return [results[i] for i in range(len(requests))]


def _padded_length(tokens: int) -> int:
    if tokens <= PROMPT_STEP:
        return PROMPT_BUCKET << math.ceil(math.log2(max(1.0, tokens / PROMPT_BUCKET)))
    return -(-tokens // PROMPT_STEP) * PROMPT_STEP


def _check(request: Request, index: int, context: int) -> None:
    if not request.prompt:
        raise PuzzleError(f"request {index} has an empty prompt, but generation needs at least one token")
    if request.max_tokens < 1:
        raise PuzzleError(f"request {index} has max_tokens {request.max_tokens}, but at least 1 is needed")
    if len(request.prompt) + request.max_tokens > context:
        raise PuzzleError(
            f"request {index} needs {len(request.prompt)} prompt and {request.max_tokens} new tokens, "
            f"but the model's context is {context}"
        )


class _Rows(NamedTuple):
    tokens: Int[Array, "batch seq"]
    lengths: Int[Array, "batch"]
    limits: Int[Array, "batch"]
    seeds: Int[Array, "batch"]


def _batch(requests: Sequence[Request], length: int, batch_size: int) -> _Rows:
    """Requests as arrays; rows beyond them are one-token prompts that stop at once."""
    tokens = np.zeros((batch_size, length), np.int32)
    lengths, limits = np.ones(batch_size, np.int32), np.zeros(batch_size, np.int32)
    seeds = np.zeros(batch_size, np.int32)
    for row, request in enumerate(requests):
        tokens[row, : len(request.prompt)] = request.prompt
        lengths[row], limits[row] = len(request.prompt), request.max_tokens
        seeds[row] = request.seed % 2**31
    return _Rows(*(jnp.asarray(x) for x in (tokens, lengths, limits, seeds)))


def _view_options(view: View | None, layers: int) -> dict[str, list[Array]]:
    if view is None:
        return {}
    return {
        "windows": [view.windows[i] for i in range(layers)],
        "expert_masks": [view.expert_masks[i] for i in range(layers)],
    }


@partial(jax.jit, static_argnames=("config", "context"))
def _prefill(
    params: Params, config: ModelConfig, rows: _Rows, context: int, view: View | None
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    options = _view_options(view, config.num_layers)
    return prefill(params, config, rows.tokens, rows.lengths, context, **options)


class _State(NamedTuple):
    step: Int[Array, ""]
    caches: list[LayerCache]
    logits: Float[Array, "batch vocab"]
    out: Int[Array, "batch limit"]
    counts: Int[Array, "batch"]
    done: Array


@partial(jax.jit, static_argnames=("config", "limit"))
def _decode(
    params: Params,
    config: ModelConfig,
    rows: _Rows,
    logits: Float[Array, "batch vocab"],
    caches: list[LayerCache],
    stops: Int[Array, "stops"],
    temperature: float | Float[Array, ""],
    limit: int,
    view: View | None,
) -> tuple[Int[Array, "batch limit"], Int[Array, "batch"]]:
    """Tokens of each row and how many of them count."""
    options = _view_options(view, config.num_layers)
    batch = rows.tokens.shape[0]

    def body(state: _State) -> _State:
        token = _sample(state.logits, rows.seeds, state.step, temperature)
        out = state.out.at[:, state.step].set(token)
        counts = state.counts + ~state.done
        done = state.done | jnp.isin(token, stops) | (counts >= rows.limits)
        positions = rows.lengths + state.step
        logits, caches = decode_step(params, config, state.caches, token, positions, **options)
        return _State(state.step + 1, caches, logits, out, counts, done)

    start = _State(
        jnp.asarray(0, jnp.int32),
        caches,
        logits,
        jnp.zeros((batch, limit), jnp.int32),
        jnp.zeros(batch, jnp.int32),
        rows.limits == 0,
    )
    end = jax.lax.while_loop(lambda s: (s.step < limit) & ~jnp.all(s.done), body, start)
    return end.out, end.counts


def _sample(
    logits: Float[Array, "batch vocab"],
    seeds: Int[Array, "batch"],
    step: Int[Array, ""],
    temperature: float | Float[Array, ""],
) -> Int[Array, "batch"]:
    """One token per row; a row's noise depends on its own seed and step alone."""

    def noise(seed: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), step), logits.shape[-1:])

    warm = logits / jnp.maximum(temperature, 1e-6) + jax.vmap(noise)(seeds)
    return jnp.argmax(jnp.where(temperature > 0, warm, logits), axis=-1).astype(jnp.int32)
