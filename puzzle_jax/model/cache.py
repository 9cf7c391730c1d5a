"""Key-value caches and the two phases that use them: prefill of prompts in chunks, and decoding one token per row.

A layer's cache is a ring in which position p lies in slot p mod slots. A windowed layer has as many slots as its
window, a full one as many as the context, so memory is what the architecture promises. Rows of a batch have prompts
of their own length, padded on the right; what a row's slots hold follows from its length.

What a cache holds is the choice of `model.cache_format`. Everything that attends reads what a cache would give back,
a chunk's own keys and values too, so results do not depend on how a prompt is cut into chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int, Num

from puzzle_jax.config import ModelConfig, cache_slots
from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.model.cache_format import CacheFormat, store
from puzzle_jax.model.network import (
    ExpertMask,
    LayerAux,
    Window,
    attention_output,
    embed,
    head_logits,
    moe_block,
    project_qkv,
)
from puzzle_jax.model.rope import RopeTable, rope_table
from puzzle_jax.model.spec import Params


class LayerCache(NamedTuple):
    """Rotated keys, and values, of one layer as they are stored, and their scales where they have any."""

    k: Num[Array, "batch kv_heads dim slots"]
    v: Num[Array, "batch kv_heads slots dim"]
    k_scale: Float[Array, ""] | None = None
    v_scale: Float[Array, ""] | None = None

    @property
    def slots(self) -> int:
        return self.k.shape[3]


def init_cache(
    config: ModelConfig,
    layer: int,
    batch: int,
    context: int,
    compute: jnp.dtype | type,
    form: CacheFormat | None = None,
    *,
    sharding: Sharding | None = None,
) -> LayerCache:
    """An empty cache of one layer; keys and values are made where `sharding` says, not moved there."""
    form = form or CacheFormat()
    slots, dtype = cache_slots(config.blocks[layer].window, context), form.stored_dtype(compute)
    k = jnp.zeros((batch, config.num_kv_heads, config.head_dim, slots), dtype, device=sharding)
    v = jnp.zeros((batch, config.num_kv_heads, slots, config.head_dim), dtype, device=sharding)
    return LayerCache(k, v, *form.layer_scales(layer))


def prefill_attention_block(
    attention: Params,
    config: ModelConfig,
    x: Float[Array, "batch chunk hidden"],
    cache: LayerCache,
    start: Int[Array, ""],
    lengths: Int[Array, "batch"],
    table: RopeTable,
    *,
    window: Window,
    context: int,
) -> tuple[Float[Array, "batch chunk hidden"], LayerCache]:
    """One attention sub-block for a chunk of each row's prompt: attends, then writes keys and values."""
    q, k, v = project_qkv(attention, config, x, table)
    stored_k = store(k, cache.k.dtype, cache.k_scale).transpose(0, 2, 3, 1)
    stored_v = store(v, cache.v.dtype, cache.v_scale).transpose(0, 2, 1, 3)
    with jax.named_scope("attention"):
        out = chunk_attention(
            q,
            stored_k,
            stored_v,
            cache.k,
            cache.v,
            attention["sinks"],
            start,
            window=window,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
    with jax.named_scope("cache"):
        cache = _write_chunk(cache, stored_k, stored_v, start, lengths, ring=cache.slots < context)
    return x + attention_output(attention, out), cache


def _write_chunk(
    cache: LayerCache,
    k: Num[Array, "batch kv_heads dim chunk"],
    v: Num[Array, "batch kv_heads chunk dim"],
    start: Int[Array, ""],
    lengths: Int[Array, "batch"],
    *,
    ring: bool,
) -> LayerCache:
    if not ring:  # position p lies in slot p; what a short row's padding leaves behind is written over before it shows
        return cache._replace(
            k=jax.lax.dynamic_update_slice_in_dim(cache.k, k, start, 3),
            v=jax.lax.dynamic_update_slice_in_dim(cache.v, v, start, 2),
        )
    # Each slot gets the last position of its row that belongs there, unless that came before this chunk.
    last = jnp.minimum(start + k.shape[3], lengths)[:, None] - 1
    index = last - (last - jnp.arange(cache.slots)[None, :]) % cache.slots - start
    fresh, index = (index >= 0)[:, None], jnp.maximum(index, 0)[:, None]
    new_k = jnp.take_along_axis(k, index[:, :, None, :], axis=3)
    new_v = jnp.take_along_axis(v, index[:, :, :, None], axis=2)
    return cache._replace(
        k=jnp.where(fresh[:, :, None, :], new_k, cache.k), v=jnp.where(fresh[:, :, :, None], new_v, cache.v)
    )


def prefill_chunk(
    params: Params,
    config: ModelConfig,
    caches: Sequence[LayerCache],
    tokens: Int[Array, "batch chunk"],
    start: Int[Array, ""],
    lengths: Int[Array, "batch"],
    *,
    context: int,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
) -> tuple[Float[Array, "batch chunk hidden"], list[LayerCache], list[LayerAux]]:
    """Runs positions start, start + 1, ... of every prompt and adds them to the caches.

    Args:
      caches: hold the positions before `start`.
      tokens: of the chunk; what lies beyond a prompt is padding.
      start: a multiple of the chunk's length, which divides the context.
      lengths: tokens of each whole prompt.
      context: slots of a full layer's cache.
      windows, expert_masks: a view, as in `network.hidden_states`; caches keep the configuration's own sizes.

    Returns:
      The last layer's output before the final norm, the caches, and every layer's routing.
    """
    table = rope_table(config.rope, config.head_dim, (start + jnp.arange(tokens.shape[1]))[None])
    x = embed(params, tokens)
    new_caches, auxes = [], []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            window = block.window if windows is None else windows[index]
            x, cache = prefill_attention_block(
                layer["attention"], config, x, caches[index], start, lengths, table, window=window, context=context
            )
            mask = None if expert_masks is None else expert_masks[index]
            x, aux = moe_block(layer["moe"], config, x, expert_mask=mask)
            new_caches.append(cache)
            auxes.append(aux)
    return x, new_caches, auxes


def decode_attention_block(
    attention: Params,
    config: ModelConfig,
    x: Float[Array, "batch 1 hidden"],
    cache: LayerCache,
    positions: Int[Array, "batch"],
    table: RopeTable,
    *,
    window: Window,
) -> tuple[Float[Array, "batch 1 hidden"], LayerCache]:
    """One attention sub-block for one new token per row: writes its key and value, then attends."""
    qkv = project_qkv(attention, config, x, table)
    with jax.named_scope("cache"):
        rows = jnp.arange(x.shape[0])
        slot = positions % cache.slots
        cache = cache._replace(
            k=cache.k.at[rows, :, :, slot].set(store(qkv.k[:, 0], cache.k.dtype, cache.k_scale)),
            v=cache.v.at[rows, :, slot].set(store(qkv.v[:, 0], cache.v.dtype, cache.v_scale)),
        )
    with jax.named_scope("attention"):
        out = decode_attention(
            qkv.q[:, 0],
            cache.k,
            cache.v,
            attention["sinks"],
            positions,
            window=window,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )
    return x + attention_output(attention, out)[:, None], cache


def decode_step(
    params: Params,
    config: ModelConfig,
    caches: Sequence[LayerCache],
    tokens: Int[Array, "batch"],
    positions: Int[Array, "batch"],
    *,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
) -> tuple[Float[Array, "batch vocab"], list[LayerCache], list[LayerAux]]:
    """Logits after one more token per row, which stands at `positions`, the caches that hold it, and its routing."""
    table = rope_table(config.rope, config.head_dim, positions[:, None])
    x = embed(params, tokens[:, None])
    new_caches, auxes = [], []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            window = block.window if windows is None else windows[index]
            x, cache = decode_attention_block(
                layer["attention"], config, x, caches[index], positions, table, window=window
            )
            mask = None if expert_masks is None else expert_masks[index]
            x, aux = moe_block(layer["moe"], config, x, expert_mask=mask)
            new_caches.append(cache)
            auxes.append(aux)
    return head_logits(params, config, x[:, 0]), new_caches, auxes
