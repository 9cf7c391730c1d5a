"""`window_attention` on TPUs, forwards and backwards, by JAX's own splash attention, which has sinks and windows.

Blocks of keys that no query of a block sees are never visited. The query heads of one key-value head are processed
together; rows of the batch and key-value heads are mapped by vmap.

Left out: windows that are data, and tuned block sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.shapes import Array, Keys, Queries, Segments, Sinks, Window

LANES, MAX_BLOCK = 128, 512


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None, interpret: bool = False
) -> Queries:
    """See the api. Raises NotImplementedError off TPUs unless interpreted, and for windows that are data."""
    if not interpret and target_platform() != "tpu":
        raise NotImplementedError(f"for TPUs, but this is {target_platform()}")
    if not (window is None or isinstance(window, int)):
        raise NotImplementedError("the window is not a static number")
    batch, seq, heads, dim = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    # Pad to whole blocks of queries and keys and to whole registers: zeros change no logit and no value that is kept.
    padding = ((0, 0), (0, -seq % LANES), (0, 0), (0, -dim % LANES))
    q, k, v = (jnp.pad(x, padding) for x in ((q * dim**-0.5).astype(q.dtype), k, v))
    whole = seq + padding[1][1]
    segments = jnp.zeros((batch, whole), jnp.int32)
    if segment_ids is not None:
        segments = jnp.pad(segment_ids.astype(jnp.int32), padding[:2])
    queries = q.reshape(batch, whole, kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
    keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    attend = _kernel(group, whole, window, interpret)
    of_heads = jax.vmap(attend, in_axes=(0, 0, 0, None, 0))
    out = jax.vmap(of_heads, in_axes=(0, 0, 0, 0, None))(
        queries, keys, values, segments, sinks.astype(jnp.float32).reshape(kv_heads, group)
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, whole, heads, -1)[:, :seq, :, :dim]


@lru_cache(maxsize=64)
def _kernel(group: int, seq: int, window: int | None, interpret: bool) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    if window is None or window >= seq:
        mask = splash.CausalMask((seq, seq))
    else:
        mask = splash.LocalMask((seq, seq), window_size=(window - 1, 0), offset=0)
    block = max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if seq % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    with jax.ensure_compile_time_eval():  # it keeps arrays made from the mask
        kernel = splash.make_splash_mqa(
            splash.MultiHeadMask([mask] * group), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
        )

    def attend(q: Array, k: Array, v: Array, segments: Array, sinks: Array) -> Any:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments), sinks=sinks)

    return attend
