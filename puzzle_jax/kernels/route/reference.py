"""Reference for `route` and `expert_order`, in plain XLA: iterated argmax or a sort, and a stable sort by expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels.grouped_matmul.layout import Blocks, blocks_of
from puzzle_jax.kernels.shapes import Array, Float, Ids, Int

FEW_PAIRS = 1024
"""Up to this many pairs, a sum and a sort replace scatters: XLA for CPUs compiles a scatter anew in every layer, which
takes longer than so few pairs ever do, but with many pairs the scatter is faster."""

_LARGEST = np.iinfo(np.int32).max

ITERATED_ARGMAX_LIMIT = 8  # up to this k, k passes of argmax beat a sort on CPU


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
    sorted_pairs = stable_order(flat, num_experts)
    if pairs <= FEW_PAIRS:
        group_sizes = jnp.sum(flat[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    else:
        group_sizes = jnp.zeros(num_experts, jnp.int32).at[flat].add(1)
    blocks = blocks_of(group_sizes, pairs, block, flat[sorted_pairs])
    source = jnp.take(sorted_pairs, blocks.source, mode="fill", fill_value=pairs)
    if pairs <= FEW_PAIRS:
        slot = blocks.slot[stable_order(sorted_pairs, pairs)]
    else:
        slot = jnp.zeros(pairs, jnp.int32).at[sorted_pairs].set(blocks.slot)
    return blocks._replace(source=source, slot=slot)


def stable_order(keys: Int[Array, "pairs"], values: int) -> Int[Array, "pairs"]:
    """Indices of a stable sort of keys of at least 0, in which all keys of at least `values` count as equal.

    Key and index are sorted as one number if it fits, which takes XLA for CPUs a quarter of the time.
    """
    pairs, keys = len(keys), jnp.minimum(keys, values)
    if (values + 1) * pairs > _LARGEST:
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    return jnp.sort(keys * pairs + jnp.arange(pairs, dtype=jnp.int32)) % pairs
