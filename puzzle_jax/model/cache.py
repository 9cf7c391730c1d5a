"""Key-value caches and the two phases that use them: prefill of prompts in chunks, and decoding one token per row.

A layer's cache is a ring in which position p lies in slot p mod slots. A windowed layer has as many slots as its
window, a full one as many as the context, so memory use is what the architecture promises. Rows of a batch have prompts
of their own length, padded on the right; what a row's slots hold follows from its length.

`model.cache_format` decides how a cache stores its numbers. Attention reads all keys and values as a cache would give
them back, a chunk's own too, so results do not depend on how a prompt is split into chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float

from puzzle_jax.config import ModelConfig, cache_slots
from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.shapes import IntScalar, KeyRing, Rows, ValueRing
from puzzle_jax.model import network
from puzzle_jax.model.cache_format import CacheFormat, store
from puzzle_jax.model.network import Batch, ExpertMask, LayerAux, States, Window
from puzzle_jax.model.rope import RopeTable, rope_table
from puzzle_jax.model.spec import Params


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
    slots = cache_slots(config.blocks[layer].window, context)
    dtype = form.stored_dtype(slots, compute)
    k = jnp.zeros((batch, config.num_kv_heads, config.head_dim, slots), dtype, device=sharding)
    v = jnp.zeros((batch, config.num_kv_heads, slots, config.head_dim), dtype, device=sharding)
    return LayerCache(k, v, *form.layer_scales(layer))


def prefill_attention_block(
    attention: Params,
    config: ModelConfig,
    x: States,
    cache: LayerCache,
    start: IntScalar,
    lengths: Rows,
    table: RopeTable,
    *,
    window: Window,
    context: int,
) -> tuple[States, LayerCache]:
    """One attention sub-block for a chunk of each row's prompt: attends, then writes keys and values."""
    q, k, v = network.project_qkv(attention, config, x, table)
    stored_k = store(k, cache.k.dtype, cache.k_scale).transpose(0, 2, 3, 1)
    stored_v = store(v, cache.v.dtype, cache.v_scale).transpose(0, 2, 1, 3)
    with jax.named_scope("attention"):
        k_ring, v_ring, k_scale, v_scale = cache
        out = chunk_attention(
            q,
            stored_k,
            stored_v,
            k_ring,
            v_ring,
            attention.get("sinks"),
            start,
            window=window,
            k_scale=k_scale,
            v_scale=v_scale,
            mesh=network.traced_mesh(),
        )
    with jax.named_scope("cache"):
        cache = _write_chunk(cache, stored_k, stored_v, start, lengths, ring=cache.slots < context)
    return x + network.attention_output(attention, out), cache


def _write_chunk(
    cache: LayerCache, k: KeyRing, v: ValueRing, start: IntScalar, lengths: Rows, *, ring: bool
) -> LayerCache:
    if not ring:  # position p lies in slot p; what a short row's padding leaves behind is overwritten before use
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
    tokens: Batch,
    start: IntScalar,
    lengths: Rows,
    *,
    context: int,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
) -> tuple[States, list[LayerCache], list[LayerAux]]:
    """Runs positions start, start + 1, ... of every prompt and adds them to the caches.

    Args:
      caches: hold the positions before `start`.
      tokens: tokens of the chunk, padded beyond the end of a prompt.
      start: a multiple of the chunk's length, which divides the context.
      lengths: length of each entire prompt.
      context: slots of a full layer's cache.
      windows, expert_masks: a view, as in `network.hidden_states`; caches keep the configuration's own sizes.

    Returns the last layer's output before the final norm, the caches, and every layer's routing.
    """
    table = rope_table(config.rope, config.head_dim, (start + jnp.arange(tokens.shape[1]))[None])
    attend = partial(prefill_attention_block, start=start, lengths=lengths, table=table, context=context)
    return _layers(params, config, network.embed(params, tokens), caches, attend, windows, expert_masks)


def _layers(
    params: Params,
    config: ModelConfig,
    x: States,
    caches: Sequence[LayerCache],
    attend: Callable[..., tuple[Array, LayerCache]],
    windows: Sequence[Window] | None,
    expert_masks: Sequence[ExpertMask] | None,
) -> tuple[States, list[LayerCache], list[LayerAux]]:
    """All layers on the same tokens: their output, caches that hold the tokens, and every layer's routing.

    Layers that are alike are traced and lowered once, but XLA compiles each of them. A scan over the layers would be
    compiled once, but each of its steps copies a layer's weights and cache: decoding on a CPU took 1.3 times as long.
    """

    def layer(x: States, params: Params, cache: LayerCache, mask: ExpertMask, *, window: Window) -> _LayerOutput:
        x, cache = attend(params["attention"], config, x, cache, window=window)
        x, aux = network.moe_block(params["moe"], config, x, expert_mask=mask)
        return _LayerOutput(x, cache, aux)

    static, traced = jax.jit(layer, static_argnames="window"), jax.jit(layer)
    outputs: list[_LayerOutput] = []
    for index, (of_layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        window = block.window if windows is None else windows[index]
        run = static if window is None or isinstance(window, int) else traced
        with jax.named_scope(f"layer_{index}"):
            mask = None if expert_masks is None else expert_masks[index]
            outputs.append(run(x, of_layer, caches[index], mask, window=window))
        x = outputs[-1].x
    return x, [output.cache for output in outputs], [output.aux for output in outputs]


class _LayerOutput(NamedTuple):
    x: States
    cache: LayerCache
    aux: LayerAux


def decode_attention_block(
    attention: Params,
    config: ModelConfig,
    x: States,
    cache: LayerCache,
    positions: Rows,
    table: RopeTable,
    *,
    window: Window,
) -> tuple[States, LayerCache]:
    """One attention sub-block for one new token per row: writes its key and value, then attends."""
    qkv = network.project_qkv(attention, config, x, table)
    with jax.named_scope("cache"):
        rows = jnp.arange(x.shape[0])
        slot = positions % cache.slots
        cache = cache._replace(
            k=cache.k.at[rows, :, :, slot].set(store(qkv.k[:, 0], cache.k.dtype, cache.k_scale)),
            v=cache.v.at[rows, :, slot].set(store(qkv.v[:, 0], cache.v.dtype, cache.v_scale)),
        )
    with jax.named_scope("attention"):
        k, v, k_scale, v_scale = cache
        out = decode_attention(
            qkv.q[:, 0],
            k,
            v,
            attention.get("sinks"),
            positions,
            window=window,
            k_scale=k_scale,
            v_scale=v_scale,
            mesh=network.traced_mesh(),
        )
    return x + network.attention_output(attention, out)[:, None], cache


def decode_step(
    params: Params,
    config: ModelConfig,
    caches: Sequence[LayerCache],
    tokens: Rows,
    positions: Rows,
    *,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
) -> tuple[Float[Array, "batch vocab"], list[LayerCache], list[LayerAux]]:
    """Logits after one more token per row, at `positions`; the caches with that token; and its routing."""
    table = rope_table(config.rope, config.head_dim, positions[:, None])
    attend = partial(decode_attention_block, positions=positions, table=table)
    x, caches, auxes = _layers(
        params, config, network.embed(params, tokens[:, None]), caches, attend, windows, expert_masks
    )
    return network.head_logits(params, config, x[:, 0]), caches, auxes
