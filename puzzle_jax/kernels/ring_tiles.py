"""How Mosaic GPU kernels read tiles of ring caches of any size, keys [dim, slots] and values [slots, dim].

A tile that reaches past the last slot is fetched all the same: TMA fills what does not exist with zeros, and kernels
mask it. What TMA requires is that rows of keys are a multiple of the swizzle in which a tile is laid out in shared
memory, which may be 128, 64 or 32 bytes wide. So caches whose slots take a multiple of 32 bytes (16 numbers of
bfloat16, 32 of e4m3) are read in place; others are first copied by XLA, with slots of zeros after the last.

Left out: reading other numbers of slots without a copy, which would take loads that are not tiles.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from puzzle_jax.kernels.shapes import Array, KeyRing, Num, Ref, ValueRing

NARROWEST = 32
"""Bytes of the narrowest swizzle that wgmma reads."""

PADDED_TO = 64
E4M3_AS_HALF = 256.0
"""Ratio of an e4m3 number to the float16 that `as_half` makes of it."""


MoreKeys = Num[Array, "batch kv_heads dim _"]
MoreValues = Num[Array, "batch kv_heads _ dim"]


def readable(k: KeyRing, v: ValueRing) -> tuple[MoreKeys, MoreValues]:
    """The same cache or, if TMA cannot read it, a copy with more slots."""
    return padded(k, v) if k.shape[3] * k.dtype.itemsize % NARROWEST else (k, v)


def padded(k: KeyRing, v: ValueRing) -> tuple[MoreKeys, MoreValues]:
    """Keys and values with slots of zeros after the last, up to a multiple of `PADDED_TO`."""
    more = -k.shape[3] % PADDED_TO
    return jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, more))), jnp.pad(v, ((0, 0), (0, 0), (0, more), (0, 0)))


def key_columns(slots: int, tile: int) -> int:
    """Columns of the swizzle of a tile of keys [dim, tile] in shared memory: a divisor of both tile and slots."""
    return math.gcd(slots, tile)


def as_half(stored: Ref, half: Ref) -> Ref:
    """Writes a tile of e4m3 bytes into another as float16, `E4M3_AS_HALF` times too small, and returns the other."""
    code = stored[...].astype(jnp.int16)
    half[...] = lax.bitcast_convert_type(((code & 0x80) << 8) | ((code & 0x7F) << 7), jnp.float16)
    return half
