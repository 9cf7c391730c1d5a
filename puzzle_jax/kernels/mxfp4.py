"""Weights stored in MXFP4: packed 4-bit codes with one shared power of two per 32 elements.

The layout is that of gpt-oss checkpoints, so bytes pass from file to device and back untouched: groups lie along the
contraction axis, byte j of a group holds element 2j in its low nibble and 2j+1 in its high one (OCP Microscaling
Formats v1.0). Only the last two axes of a checkpoint's codes, [inputs / 32, 16], are merged: a TPU would pad 16 to
128. Decoding is exact in float32 and bfloat16 for every scale from 2 to 254; the two smallest scales give subnormal
numbers, which XLA may flush to zero.

Left out: encoding, which belongs to checkpoints (`puzzle_jax.convert_hf.tensors.mxfp4`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Float, Int, Matrices, UInt8

GROUP = 32
MOST_DECODED = 1 << 28
"""Bytes of decoded matrices that an operation may hold; packed experts beyond that are decoded one at a time."""
TILE_BYTES = 1 << 22
"""Bytes of a matrix that `matmul` decodes at a time."""
CODE_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


if TYPE_CHECKING:
    Codes = UInt8[Array, "experts outputs half_inputs"]
    Scales = UInt8[Array, "experts outputs groups"]
else:  # JAX builds trees whose leaves are not arrays while it differentiates
    Codes = Scales = object


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MXFP4:
    """A stack of matrices [experts, inputs, outputs] in packed form.

    Attributes:
      codes: two to a byte, uint8 [experts, outputs, inputs / 2].
      scales: exponents with bias 127, uint8 [experts, outputs, inputs / 32].
    """

    codes: Codes
    scales: Scales

    @property
    def shape(self) -> tuple[int, int, int]:
        """The logical shape (experts, inputs, outputs)."""
        experts, outputs, groups = self.scales.shape
        return experts, groups * GROUP, outputs

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Weights = Matrices | MXFP4


@partial(jax.jit, static_argnames="dtype", inline=True)
def decode(weight: MXFP4, dtype: jnp.dtype | type = jnp.float32) -> Float[Array, "experts inputs outputs"]:
    """The values of `weight`, inputs before outputs, ready for `x @ w`."""
    experts, inputs, outputs = weight.shape
    codes = weight.codes.astype(jnp.int32)
    values = jnp.stack([code_values(codes & 0xF), code_values(codes >> 4)], axis=-1)
    scaled = values.reshape(experts, outputs, inputs // GROUP, GROUP) * scale_values(weight.scales)[..., None]
    return scaled.reshape(experts, outputs, inputs).swapaxes(1, 2).astype(dtype)


def code_values(codes: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The values of 4-bit codes held in 32 bits, by arithmetic: kernels have no lookup tables."""
    # Two bits of exponent and one of mantissa become those of a float32 whose exponent starts at 1 / 2. This is correct
    # for all but the two smallest, which a float32 built this way cannot represent.
    magnitude = jax.lax.bitcast_convert_type(((codes & 7) << 22) + (126 << 23), jnp.float32)
    magnitude = jnp.where(codes & 6 == 0, 0.5 * (codes & 1).astype(jnp.float32), magnitude)
    return jnp.where(codes & 8 == 0, magnitude, -magnitude)


def scale_values(scales: UInt8[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Powers of two, built from their bits: on some platforms exp2 is off by parts per million."""
    return jax.lax.bitcast_convert_type(scales.astype(jnp.int32) << 23, jnp.float32)


def matmul(rows: Float[Array, "rows inputs"], weight: MXFP4) -> Float[Array, "rows outputs"]:
    """Rows times the only matrix of `weight`, in plain XLA: a tile of outputs at a time, so that decoded weights stay
    in a CPU's caches.

    Even and odd inputs are separate sums, since a byte holds one of each: results differ from those of a decoded matrix
    by rounding.
    """
    _, inputs, outputs = weight.shape
    tile = next(size for size in range(max(1, TILE_BYTES // (4 * inputs)), 0, -1) if outputs % size == 0)
    halves = rows[:, ::2], rows[:, 1::2]

    def one(index: Int[Array, ""], out: Array) -> Array:
        part = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf[0], index * tile, tile), weight)
        codes, scales = part.codes.astype(jnp.int32), scale_values(part.scales)[..., None]
        matrices = (
            (code_values(each).reshape(tile, -1, GROUP // 2) * scales).reshape(tile, -1).astype(rows.dtype)
            for each in (codes & 0xF, codes >> 4)
        )
        even, odd = (
            jnp.matmul(half, matrix.T, preferred_element_type=jnp.float32)
            for half, matrix in zip(halves, matrices, strict=True)
        )
        return jax.lax.dynamic_update_slice_in_dim(out, even + odd, index * tile, axis=1)

    out = jnp.zeros((len(rows), outputs), jnp.float32)
    return jax.lax.fori_loop(0, outputs // tile, one, out).astype(rows.dtype)


def decoded_together(dtype: jnp.dtype | type, *weights: MXFP4 | Array) -> bool:
    """Returns whether decoding the packed matrices among `weights` all at once takes at most `MOST_DECODED` bytes."""
    numbers = sum(math.prod(weight.shape) for weight in weights if isinstance(weight, MXFP4))
    return numbers * jnp.dtype(dtype).itemsize <= MOST_DECODED


def check_decoded(dtype: jnp.dtype | type, *weights: MXFP4 | Array) -> None:
    """Raises NotImplementedError unless the weights are `decoded_together`."""
    if not decoded_together(dtype, *weights):
        raise NotImplementedError(f"packed experts would take more than {MOST_DECODED:,} bytes, decoded all at once")


def as_dense(weight: MXFP4 | Array, dtype: jnp.dtype | type) -> Float[Array, "..."]:
    """`weight` as an array of `dtype`, decoded if it is packed."""
    return decode(weight, dtype) if isinstance(weight, MXFP4) else weight.astype(dtype)
