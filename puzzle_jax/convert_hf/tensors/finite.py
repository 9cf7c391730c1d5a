"""A test of the bits of numbers for NaN and infinity, fast enough for every weight that is read.

The exponent bits of NaN and infinity are all ones. Where no value of a piece has the highest exponent bit set, all
magnitudes are below 2 and therefore finite; one bitwise or finds that out. Otherwise the bits are compared as integers,
which are largest for values that are not finite: signed integers among positive values, unsigned ones among negative
values. On a piece in the processor's cache, either test takes a small fraction of the time it took to read the piece.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class _Bits(NamedTuple):
    signed: type[np.signedinteger]
    unsigned: type[np.unsignedinteger]
    limit: int
    highest: int  # bit of the exponent
    sign: int


_BITS = {
    np.dtype(ml_dtypes.bfloat16): _Bits(np.int16, np.uint16, 0x7F80, 0x4000, 0x8000),
    np.dtype(np.float16): _Bits(np.int16, np.uint16, 0x7C00, 0x4000, 0x8000),
    np.dtype(ml_dtypes.float8_e4m3fn): _Bits(np.int8, np.uint8, 0x7F, 0x40, 0x80),  # without infinity
    # A value that rounds to infinity in bfloat16, the type of weights at rest, counts as infinite.
    np.dtype(np.float32): _Bits(np.int32, np.uint32, 0x7F7F8000, 0x40000000, 0x80000000),
}
_PIECE_BYTES = 256 << 10


def all_finite(array: np.ndarray) -> bool:
    """Returns whether all values are finite, in bfloat16 too; integers always are.

    Args:
      array: bfloat16, float16, float32, e4m3 or integers; contiguous ones are not copied.
    """
    bits = _BITS.get(array.dtype)
    if bits is None:
        return not np.issubdtype(array.dtype, np.inexact) or bool(np.isfinite(array).all())
    flat = np.ascontiguousarray(array).reshape(-1)
    signed, unsigned = flat.view(bits.signed), flat.view(bits.unsigned)
    step = _PIECE_BYTES // flat.itemsize
    for start in range(0, flat.size, step):
        piece = slice(start, start + step)
        if not np.bitwise_or.reduce(unsigned[piece]) & bits.highest:
            continue
        if signed[piece].max() >= bits.limit or unsigned[piece].max() >= bits.sign + bits.limit:
            return False
    return True
