"""Shapes in signatures: jaxtyping's names if it is installed, and otherwise names that check nothing.

Kernels need only jax and numpy, so that they can be copied into other projects; the shape checks in tests are not part
of them. The aliases below are for arguments that an operation's implementations share; its api describes each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from typing import Protocol

    from jaxtyping import Array, Bool, Float, Int, Num, Shaped, UInt8

    class _At(Protocol):
        def __getitem__(self, index: object) -> Ref: ...

    Index = Array | int

    class Ref(Protocol):
        """Memory that a Pallas kernel reads and writes by indexing; `at` selects a part of it."""

        shape: tuple[int, ...]
        dtype: jax.numpy.dtype
        at: _At
        T: Ref

        def __getitem__(self, index: object) -> Array: ...
        def __setitem__(self, index: object, value: object) -> None: ...

else:
    Ref = Index = object
    try:
        from jaxtyping import Array, Bool, Float, Int, Num, Shaped, UInt8
    except ModuleNotFoundError:

        class _AnyShape:
            def __class_getitem__(cls, _):
                return cls

        Array = Bool = Float = Int = Num = Shaped = UInt8 = _AnyShape

__all__ = ["Array", "Bool", "Float", "Index", "Int", "Num", "Ref", "Shaped", "UInt8"]

# Attention.
Heads = Float[Array, "batch heads dim"]  # one position per row
Rows = Int[Array, "batch"]
Queries = Float[Array, "batch seq heads dim"]
Keys = Float[Array, "batch seq kv_heads dim"]  # also values
KeyRing = Num[Array, "batch kv_heads dim slots"]
ValueRing = Num[Array, "batch kv_heads slots dim"]
ChunkKeys = Num[Array, "batch kv_heads dim chunk"]  # as a cache stores them
ChunkValues = Num[Array, "batch kv_heads chunk dim"]
Sinks = Float[Array, "heads"]
Scale = Float[Array, ""] | None
Segments = Int[Array, "batch seq"] | None
Window = int | Int[Array, "#batch"] | None
Starts = Int[Array, ""] | Int[Array, "batch"]  # one for all rows, or one per row

# Mixtures of experts.
Tokens = Float[Array, "tokens hidden"]
Ids = Int[Array, "tokens k"]
ExpertOutputs = Float[Array, "tokens k hidden"]
Matrices = Float[Array, "experts first second"]
Sorted = Float[Array, "_ _"]  # rows sorted by expert
GroupSizes = Int[Array, "groups"]
BlockExperts = Int[Array, "blocks"]
IntScalar = Int[Array, ""]
