"""How many logits an implementation of `window_attention` may hold at a time."""

from __future__ import annotations

import math

LARGEST = 2**30
"""On all devices together; float32, so 4 GB."""


def refuse_too_many(*shape: int) -> None:
    """Raises NotImplementedError for logits of a shape that `online_blocks` should have."""
    if math.prod(shape) > LARGEST:
        raise NotImplementedError(f"logits of shape {shape} are too many at a time")
