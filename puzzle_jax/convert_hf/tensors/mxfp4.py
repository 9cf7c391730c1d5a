"""MXFP4 in NumPy: bit-exact decoding, and the encoder that exports use.

A group of 32 values along the inputs shares a power of two; each value is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
with a sign (OCP Microscaling Formats v1.0). Encoders differ in the choice of the power; this one takes the
smallest that clips nothing, ceil(log2(amax / 6)), and rounds to the nearest code, ties to even. Decoding and
encoding again keeps values but not always bytes, so experts that were only pruned are copied, never
re-encoded.

The layout at rest is that of `puzzle_jax.kernels.mxfp4`, whose decoder is this one's counterpart on the
device.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import DTypeLike

from puzzle_jax.errors import PuzzleError
from puzzle_jax.kernels.mxfp4 import CODE_VALUES, GROUP

_BIAS = 127
_SMALLEST, _LARGEST = 2, 254  # scale bytes whose products are normal numbers in every decoder

_TOO_LARGE = 2.0**127  # rounding up from here may exceed float32


def decode(
    blocks: UInt8[np.ndarray, "experts outputs groups 16"],
    scales: UInt8[np.ndarray, "experts outputs groups"],
    dtype: DTypeLike = np.float32,
) -> Float[np.ndarray, "experts inputs outputs"]:
    """The values of packed matrices, inputs before outputs, ready for `x @ w`.

    Exact for every code and scale up to 254 that `dtype` (float32 or bfloat16) can hold; larger values are
    infinite.
    """
    experts, outputs, groups = scales.shape
    table = np.asarray(CODE_VALUES, np.float32)
    values = np.empty((experts, groups * GROUP, outputs), dtype)
    for index in range(experts):  # one at a time: the working copy of a whole layer would be 16 times its bytes
        codes = np.stack([blocks[index] & 0xF, blocks[index] >> 4], axis=-1).reshape(outputs, groups, GROUP)
        with np.errstate(over="ignore"):
            scaled = np.ldexp(table[codes], scales[index].astype(np.int32)[..., None] - _BIAS)
        values[index] = scaled.reshape(outputs, -1).T.astype(dtype)
    return values


def encode(
    values: Float[np.ndarray, "experts inputs outputs"],
) -> tuple[UInt8[np.ndarray, "experts outputs groups 16"], UInt8[np.ndarray, "experts outputs groups"]]:
    """Packs matrices into blocks and scales; a group of zeros gets the scale 1.

    Raises `PuzzleError` where a magnitude is not below 2^127 or the inputs are no multiple of 32.
    """
    experts, inputs, outputs = values.shape
    if inputs % GROUP:
        raise PuzzleError(f"an expert matrix has {inputs} inputs, but MXFP4 needs a multiple of {GROUP}")
    groups = inputs // GROUP
    blocks = np.empty((experts, outputs, groups, GROUP // 2), np.uint8)
    scales = np.empty((experts, outputs, groups), np.uint8)
    for index in range(experts):
        grouped = np.asarray(values[index], np.float32).T.reshape(outputs, groups, GROUP)
        largest = np.abs(grouped).max(axis=-1)
        if not (largest < _TOO_LARGE).all():
            raise PuzzleError(f"expert {index} holds values that are not finite or beyond {_TOO_LARGE:.1e}")
        exponent = _shared_exponent(largest)
        scales[index] = exponent + _BIAS
        # The product with the inverse power is exact and leaves magnitudes of at most 6.
        codes = np.ldexp(grouped, -exponent[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
        blocks[index] = codes[..., 0::2] | codes[..., 1::2] << 4
    return blocks, scales


def _shared_exponent(largest: np.ndarray) -> np.ndarray:
    """ceil(log2(largest / 6)) without rounding: largest = m 2^e with m in [0.5, 1), and 6 = 0.75 * 2^3."""
    mantissa, exponent = np.frexp(largest)
    exponent = np.where(mantissa <= 0.75, exponent - 3, exponent - 2)
    exponent = np.clip(exponent, _SMALLEST - _BIAS, _LARGEST - _BIAS)
    return np.where(largest > 0, exponent, 0)
