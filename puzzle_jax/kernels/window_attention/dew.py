"""`window_attention` by dew-flash-attn (extras `flash-cuda12` and `flash-cuda13`): FlashAttention-2 and, on Hopper,
FlashAttention-3, with windows, sinks and gradients.

The library has been compiled together with our kernels but not run here: it is only for NVIDIA GPUs.
Left out: packed sequences, which it takes as offsets and not as segments, and windows that are data.
"""

from __future__ import annotations

import jax.numpy as jnp

from puzzle_jax.kernels.libraries import library
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Keys, Queries, Segments, Sinks, Window

MOST_DIM = 256


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None
) -> Queries:
    """See the api. Raises NotImplementedError off GPUs, if the library is not installed, and for arguments that it does
    not take."""
    if target_platform() != "gpu":
        raise NotImplementedError(f"for GPUs, but this is {target_platform()}")
    if not (window is None or isinstance(window, int)) or segment_ids is not None:
        raise NotImplementedError("it takes one window for all rows, and no segments")
    if any(each.dtype not in (jnp.bfloat16, jnp.float16) or each.dtype != q.dtype for each in (q, k, v)):
        raise NotImplementedError(f"for bfloat16 or float16, but q, k and v are {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] > MOST_DIM:
        raise NotImplementedError(f"heads of {q.shape[3]} numbers are more than {MOST_DIM}")
    flash = library("dew_flash_attn", "flash-cuda13")
    before = -1 if window is None else window - 1  # keys before a query's own
    return flash.flash_mha(q, k, v, is_causal=True, window_size=(before, 0), sinks=sinks.astype(jnp.float32))
