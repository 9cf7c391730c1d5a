"""`route` and `expert_order` by a kernel that goes over tiles of tokens once: its interface, and what is built on it.

For each tile of tokens a kernel returns, as requested,

    choice   the k largest logits of a token, best first, and their gates
    tally    each pair's rank among the tile's pairs of its expert, and how many pairs of the tile each expert has

A pair's row is then a sum of three numbers, where a sort would compare all pairs: the first row of its expert, the
number of the expert's pairs in earlier tiles, and its rank. Ranks follow the order of tokens and choices, as in a
stable sort. Within a tile they come from one matrix product, of a triangle of ones on the left and the tile's choices,
as zeros and ones, on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.grouped_matmul.layout import Blocks, num_blocks
from puzzle_jax.kernels.shapes import Array, Float, Ids, Int


class Tally(NamedTuple):
    """A kernel's results for tokens in tiles; entries that were not requested are None.

    Attributes:
      ids, gates: the chosen experts and their gates.
      rank: rank of each pair within its tile and expert.
      counts: number of pairs of each tile and expert.
      tile: tokens per tile.
    """

    ids: Ids | None = None
    gates: Float[Array, "tokens k"] | None = None
    rank: Ids | None = None
    counts: Int[Array, "tiles experts"] | None = None
    tile: int = 1


Kernel = Callable[..., Tally]
"""Called with (logits or None, ids or None, k, experts, tally=)."""


def route(
    kernel: Kernel, logits: Float[Array, "tokens experts"], k: int, ids: Ids | None
) -> tuple[Ids, Float[Array, "tokens k"]]:
    """See the api. Differentiable in `logits`."""
    return _route(kernel, k, logits, ids)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(kernel: Kernel, k: int, logits: Array, ids: Ids | None) -> tuple[Ids, Array]:
    found = kernel(logits, ids, k, logits.shape[1], tally=False)
    assert found.ids is not None and found.gates is not None
    return found.ids, found.gates


def _save(kernel: Kernel, k: int, logits: Array, ids: Ids | None) -> tuple[tuple[Ids, Array], tuple[Array, ...]]:
    found: tuple[Ids, Array] = _route(kernel, k, logits, ids)
    return found, (*found, logits)


def _backward(kernel: Kernel, k: int, saved: tuple[Array, ...], d_out: tuple[object, Array]) -> tuple[Array, None]:
    ids, gates, logits = saved
    d_gates = d_out[1]
    d_chosen = gates * (d_gates - jnp.sum(gates * d_gates, axis=1, keepdims=True))
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros_like(logits).at[rows, ids].add(d_chosen), None


_route.defvjp(_save, _backward)


def expert_order(kernel: Kernel, ids: Ids, num_experts: int, block: int) -> Blocks:
    """See the api."""
    tokens, k = ids.shape
    found = kernel(None, ids, k, num_experts, tally=True)
    assert found.rank is not None and found.counts is not None
    before = jnp.cumsum(found.counts, axis=0) - found.counts
    group_sizes = before[-1] + found.counts[-1]
    pairs, blocks = ids.size, num_blocks(ids.size, num_experts, block)
    of_expert = -(-group_sizes // block)
    last_block = jnp.cumsum(of_expert)
    first = before + ((last_block - of_expert) * block)[None]  # row of the first pair of each expert in each tile
    known = ids < num_experts
    at = jnp.arange(tokens)[:, None] // found.tile, jnp.minimum(ids, num_experts - 1)
    slot = jnp.where(known, first[at] + found.rank, blocks * block).astype(jnp.int32).reshape(-1)
    source = jnp.full(blocks * block, pairs, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    used = last_block[-1]
    of_block = jnp.searchsorted(last_block, jnp.minimum(jnp.arange(blocks), jnp.maximum(used - 1, 0)), side="right")
    expert = jnp.minimum(of_block, num_experts - 1).astype(jnp.int32)
    return Blocks(source, slot, expert, used.astype(jnp.int32), group_sizes.astype(jnp.int32))
