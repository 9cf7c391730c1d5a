"""Trials of kernels of `route` and `expert_order`: with the actual number of experts, and at most 4,096 tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels.self_check import Trial
from puzzle_jax.kernels.shapes import Array, Float, Ids

MOST_TOKENS, FEATURES = 4096, 16


def _tokens(count: int) -> int:
    """Rounds up to a power of two, at most `MOST_TOKENS`; below that, minus one if `count` is not a power of two."""
    most = min(1 << max(0, count - 1).bit_length(), MOST_TOKENS)
    return most if count == most or most == MOST_TOKENS else most - 1


def route_trial(
    logits: Float[Array, "tokens experts"], k: int, ids: Ids | None, run: Callable[..., tuple[Array, Array]]
) -> Trial:
    """A trial of `route`; `run` is the api. It compares the gates by expert."""
    (count, experts), replayed = logits.shape, ids is not None
    tokens = max(1, _tokens(count))

    def arrays() -> tuple[Array, Array]:
        source = np.random.default_rng(0)
        # Multiples of a quarter, so that many are equal.
        found = np.round(source.normal(size=(tokens, experts)) * 4) / 4
        chosen = np.argsort(source.random((tokens, experts)), axis=1)[:, :k]
        return jnp.asarray(found, jnp.float32), jnp.asarray(chosen, jnp.int32)

    def by_expert(logits: Array, ids: Array, **named: str | None) -> Array:
        chosen, gates = run(logits, k, ids=ids if replayed else None, **named)
        return jnp.zeros_like(logits).at[jnp.arange(tokens)[:, None], chosen].set(gates)

    name = f"{tokens} tokens top {k} of {experts}{' replayed' if replayed else ''}"
    return Trial(name, arrays, by_expert, differentiable=(0,))


def order_trial(ids: Ids, experts: int, block: int, run: Callable[..., object]) -> Trial:
    """A trial of `expert_order`; `run` is the api. It compares random rows of the pairs laid out in blocks, the same
    rows read back from there, and each block's expert."""
    count, k = ids.shape
    tokens = max(1, _tokens(count))

    def arrays() -> tuple[Array, Array]:
        source = np.random.default_rng(0)
        chosen = np.argsort(source.random((tokens, experts)) * np.arange(1, experts + 1), axis=1)[:, :k]
        chosen[tokens // 3 :: 7] = experts  # ids past the experts
        return jnp.asarray(chosen, ids.dtype), jax.random.normal(jax.random.key(0), (tokens * k, FEATURES))

    def laid_out(ids: Array, rows: Array, **named: str | None) -> Array:
        order = run(ids, experts, block, **named)
        source, slot, expert = order.source, order.slot, order.expert  # type: ignore[attr-defined]
        padded = jnp.take(rows, source, axis=0, mode="fill", fill_value=0)
        back = jnp.take(padded, slot, axis=0, mode="fill", fill_value=0)
        numbers = jnp.broadcast_to(expert.astype(rows.dtype)[:, None], (len(expert), FEATURES)) / experts
        return jnp.concatenate([padded, back, numbers])

    return Trial(f"{tokens} tokens top {k} of {experts} blocks of {block}", arrays, laid_out)
