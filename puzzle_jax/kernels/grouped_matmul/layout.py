"""The layout of rows in blocks of one expert each, as the kernels of `grouped_matmul` take them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, BlockExperts, Int, IntScalar
from puzzle_jax.kernels.tiles import tiles


class Blocks(NamedTuple):
    """Where grouped rows are once every group is padded to whole blocks.

    Attributes:
      source: the row that fills each padded row; out of range where none does.
      slot: the padded row of each row; rows past the last group share one beyond the end.
      expert: expert of each block; blocks past the last used one repeat its expert.
      used: number of blocks that hold rows, which come first.
      group_sizes: rows per expert.
    """

    source: Int[Array, "padded"]
    slot: Int[Array, "rows"]
    expert: BlockExperts
    used: IntScalar
    group_sizes: Int[Array, "experts"]


def half_share(rows: int, num_experts: int, least: int, most: int) -> int:
    """Rows per block: the power of two at or above half the mean rows per expert, within limits.

    Half, because blocks of half an expert's share waste about a quarter of that share on padding, while the weights are
    read only twice.
    """
    target = max(1, rows // (2 * num_experts))
    return min(most, max(least, 1 << (target - 1).bit_length()))


def mean_share(operation: str, rows: int, num_experts: int, packed: bool, *, least: int, most: int) -> int:
    """Rows per block of a kernel: the power of two nearest to the mean rows per expert, within limits, unless tuned."""
    nearest = 1 << max(0, round(math.log2(max(1, rows / num_experts))))
    operation = f"grouped_matmul.{operation}.{'packed' if packed else 'dense'}_block"
    return tiles(operation, rows / num_experts, block=min(most, max(least, nearest)))["block"]


def num_blocks(rows: int, num_experts: int, block: int) -> int:
    """Blocks that suffice for any spread of rows over experts: each expert leaves at most `block - 1` rows empty."""
    return max(1, min((rows + min(num_experts, rows) * (block - 1)) // block, rows))


def blocks_of(
    group_sizes: Int[Array, "experts"], rows: int, block: int, expert_of: Int[Array, "rows"] | None = None
) -> Blocks:
    """Lays out `rows` rows, sorted by expert, in blocks; rows past the sum of `group_sizes` are left out.

    Args:
      expert_of: expert of every row, if known; otherwise it is computed.
    """
    experts = len(group_sizes)
    blocks = num_blocks(rows, experts, block)
    end = jnp.cumsum(group_sizes)
    last_block = jnp.cumsum(-(-group_sizes // block))
    row = jnp.arange(rows, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(end, row, side="right"), experts - 1) if expert_of is None else expert_of
    first = (last_block - -(-group_sizes // block)) * block - (end - group_sizes)
    slot = jnp.where(row < end[-1], row + first[expert], blocks * block).astype(jnp.int32)
    used = last_block[-1]
    of_block = jnp.searchsorted(last_block, jnp.minimum(jnp.arange(blocks), jnp.maximum(used - 1, 0)), side="right")
    of_block = jnp.minimum(of_block, experts - 1).astype(jnp.int32)
    padded = jnp.arange(blocks * block, dtype=jnp.int32)
    of_row = of_block[padded // block]
    back = padded - first[of_row]
    source = jnp.where((padded < used * block) & (back < end[of_row]), back, rows).astype(jnp.int32)
    return Blocks(source, slot, of_block, used.astype(jnp.int32), group_sizes)
