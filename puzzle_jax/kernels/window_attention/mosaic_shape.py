"""The shapes that Mosaic GPU kernels of `window_attention` are built for, and the tiles of 64 keys that queries see.

Left out: skipping unseen tiles in between, as there are when segments are in no order.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Int, Rows

TILE = 64

Tiles = Int[Array, "batch tiles"]


class Shape(NamedTuple):
    """Sizes and options that a kernel is built for."""

    batch: int
    seq: int
    heads: int
    kv_heads: int
    dim: int
    windowed: bool
    segments: bool
    interpret: bool
    wide: bool

    @property
    def tiles(self) -> int:
        return self.seq // TILE

    def bounds(self, segments: Int[Array, "batch seq"], widths: Rows) -> tuple[Tiles, Tiles]:
        """The first tile of keys that each block of queries may see, and the last block of queries that may see each
        tile of keys: by windows, and by the tiles' ranges of segments, which overlap if two tiles share one."""
        tile = jnp.arange(self.tiles, dtype=jnp.int32)[None]
        first = jnp.maximum(tile * TILE - widths[:, None] + 1, 0) // TILE
        last = jnp.minimum((tile * TILE + TILE + widths[:, None] - 2) // TILE, self.tiles - 1)
        if self.segments:
            by_tile = segments.reshape(self.batch, self.tiles, TILE)
            low, high = jnp.min(by_tile, axis=2), jnp.max(by_tile, axis=2)
            meets = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
            first = jnp.maximum(first, jnp.argmax(meets, axis=2))
            last = jnp.minimum(last, self.tiles - 1 - jnp.argmax(meets[:, :, ::-1], axis=2))
        return first.astype(jnp.int32), last.astype(jnp.int32)
