"""Reference for `route` and `expert_order`, in plain XLA: iterated argmax or a sort, and a stable sort by expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.grouped_matmul.layout import Blocks, blocks_of
from puzzle_jax.kernels.shapes import Array, Float, Ids

FEW_PAIRS = 4096
"""Pairs up to which a sum and a sort take the place of scatters: XLA for CPUs compiles a scatter anew in every layer,
which takes longer than so few pairs ever do, and runs it faster where there are many."""

ITERATED_ARGMAX_LIMIT = 8  # up to here k passes of argmax beat a sort on CPU


def route(logits: Float[Array, "tokens experts"], k: int, ids: Ids | None) -> tuple[Ids, Float[Array, "tokens k"]]:
    """Chosen experts and their gates; see the api."""
    ids = top_k_ids(logits, k) if ids is None else ids
    return ids, jax.nn.softmax(jnp.take_along_axis(logits, ids, axis=-1), axis=-1)


def top_k_ids(logits: Float[Array, "tokens experts"], k: int) -> Ids:
    """Indices of the k largest logits, largest first, lower index first among equals."""
    logits = jax.lax.stop_gradient(logits)
    if k > ITERATED_ARGMAX_LIMIT:
        return jax.lax.top_k(logits, k)[1]
    chosen = []
    taken = jnp.zeros(logits.shape, bool)
    for _ in range(k):
        # A taken expert ranks below one that is masked out, so that no index ever appears twice.
        rank = jnp.where(taken, -jnp.inf, jnp.maximum(logits, jnp.finfo(logits.dtype).min))
        best = jnp.argmax(rank, axis=-1)
        chosen.append(best)
        taken = taken | jax.nn.one_hot(best, logits.shape[-1], dtype=bool)
    return jnp.stack(chosen, axis=-1)


def expert_order(ids: Ids, num_experts: int, block: int) -> Blocks:
    """Pairs in blocks, by a stable sort; see the api."""
    pairs, flat = ids.size, ids.reshape(-1)
    sorted_pairs = jnp.argsort(flat, stable=True).astype(jnp.int32)
    if pairs <= FEW_PAIRS:
        group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    else:
        group_sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1)
    blocks = blocks_of(group_sizes, pairs, block, flat[sorted_pairs])
    source = jnp.take(sorted_pairs, blocks.source, mode="fill", fill_value=pairs)
    if pairs <= FEW_PAIRS:
        slot = blocks.slot[jnp.argsort(sorted_pairs)]
    else:
        slot = jnp.zeros(pairs, jnp.int32).at[sorted_pairs].set(blocks.slot)
    return blocks._replace(source=source, slot=slot)
