"""Shapes in signatures: jaxtyping's names where it is installed, and where it is not, names that promise nothing.

Kernels need jax and numpy alone, so that they can be taken elsewhere; what checks shapes in tests is no part of them.
"""

from __future__ import annotations

from typing import Any

try:
    from jaxtyping import Array, Bool, Float, Int, Num, Shaped, UInt8
except ModuleNotFoundError:

    class _AnyShape:
        def __class_getitem__(cls, _: Any) -> Any:
            return cls

    Array = Bool = Float = Int = Num = Shaped = UInt8 = _AnyShape  # pyright: ignore[reportAssignmentType]

__all__ = ["Array", "Bool", "Float", "Int", "Num", "Shaped", "UInt8"]
