"""The e4m3 form of cached keys and values: one byte each, one scale per tensor.

    stored = e4m3(clip(x / scale, -448, 448)),  read = stored * scale

The clip comes first because a cast gives NaN above 464, not the largest number. Readers of a cache do not multiply
by the scale: attention folds it into logits and output. Stored numbers are held as uint8: a compiler without
arithmetic for float8 would convert whole caches to copy a row. Left out: e5m2, scales per head or per block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Float, Int, UInt8

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


def encode_e4m3(x: Float[Array, "*shape"], scale: Float[Array, ""]) -> UInt8[Array, "*shape"]:
    """`x / scale` as bytes of e4m3, saturating."""
    scaled = x.astype(jnp.float32) / scale
    return jax.lax.bitcast_convert_type(jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(E4M3), jnp.uint8)


def round_e4m3(x: Float[Array, "*shape"], scale: Float[Array, ""], dtype: jnp.dtype | type) -> Float[Array, "*shape"]:
    """The numbers that `encode_e4m3` would store, in a dtype that holds them. Avoids the e4m3 cast, slow on CPUs."""
    scaled = jnp.clip(x.astype(jnp.float32) / scale, -E4M3_MAX, E4M3_MAX)
    # Subnormals have a fixed last place; others keep three bits of mantissa, with ties to even as in a cast.
    rounded = jnp.where(
        jnp.abs(scaled) < 2.0**-6,
        jnp.round(scaled * 2.0**9) * 2.0**-9,
        jax.lax.reduce_precision(scaled, exponent_bits=8, mantissa_bits=3),
    )
    return rounded.astype(dtype)


def decode_e4m3(stored: UInt8[Array, "*shape"], dtype: jnp.dtype | type) -> Float[Array, "*shape"]:
    """The numbers that e4m3 bytes stand for, without their scale; exact in float16, bfloat16 and float32.

    XLA's own cast is slow on CPU. There the seven low bits become exponent and mantissa of a float16, whose bias
    is larger by 8, with the sign in front; the processor converts that.
    """
    return jax.lax.platform_dependent(stored, cpu=lambda s: _decode_bits(s).astype(dtype), default=_cast(dtype))


def _cast(dtype: jnp.dtype | type):
    return lambda stored: jax.lax.bitcast_convert_type(stored, E4M3).astype(dtype)


def _decode_bits(stored: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    bits = stored.astype(jnp.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return jax.lax.bitcast_convert_type(half, jnp.float16).astype(jnp.float32) * 256.0


def e4m3_values(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values of e4m3 codes held in 32 bits, by arithmetic: not all kernels have the type."""
    # Exponent and mantissa become those of a float32, whose bias is larger by 120. Subnormals have no exponent.
    magnitude = jax.lax.bitcast_convert_type(((codes & 0x7F) << 20) + (120 << 23), jnp.float32)
    magnitude = jnp.where(codes & 0x78 == 0, 2.0**-9 * (codes & 7).astype(jnp.float32), magnitude)
    return jnp.where(codes & 0x80 == 0, magnitude, -magnitude)
