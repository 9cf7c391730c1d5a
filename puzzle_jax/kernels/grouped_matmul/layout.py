"""Rows in blocks of one expert each, the form in which the kernels of `grouped_matmul` take them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Int


class Blocks(NamedTuple):
    """Where grouped rows lie once every group is padded to whole blocks.

    Attributes:
      source: the row that fills each padded row; out of range where none does.
      slot: the padded row of each row; rows past the last group share one beyond the end.
      expert: of each block; blocks past the last used one repeat its expert.
      used: number of blocks that hold rows.
    """

    source: Int[Array, "padded"]
    slot: Int[Array, "rows"]
    expert: Int[Array, "blocks"]
    used: Int[Array, ""]


def num_blocks(rows: int, num_experts: int, block: int) -> int:
    """Blocks that suffice however rows are spread over experts: each leaves at most `block - 1` rows of one empty."""
    return max(1, min((rows + min(num_experts, rows) * (block - 1)) // block, rows))


def blocks_of(
    group_sizes: Int[Array, "experts"], rows: int, block: int, expert_of: Int[Array, "rows"] | None = None
) -> Blocks:
    """Lays `rows` rows, sorted by expert, out in blocks; what lies past the sum of `group_sizes` is left out.

    Args:
      expert_of: every row's expert, where that is known; else it is found.
    """
    experts = len(group_sizes)
    blocks = num_blocks(rows, experts, block)
    end = jnp.cumsum(group_sizes)
    last_block = jnp.cumsum(-(-group_sizes // block))
    row = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, row, side="right"), experts - 1) if expert_of is None else expert_of
    first = (last_block - -(-group_sizes // block)) * block - (end - group_sizes)
    slot = jnp.where(row < end[-1], row + first[expert], blocks * block).astype(jnp.int32)
    source = jnp.full(blocks * block, rows, jnp.int32).at[slot].set(row, mode="drop")
    used = last_block[-1]
    of_block = jnp.searchsorted(last_block, jnp.minimum(jnp.arange(blocks), jnp.maximum(used - 1, 0)), side="right")
    return Blocks(source, slot, jnp.minimum(of_block, experts - 1).astype(jnp.int32), used.astype(jnp.int32))
