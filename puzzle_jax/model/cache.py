"""Key-value caches and the two phases that use them: prefill of prompts, and decoding one token per row.

A layer's cache is a ring in which position p lies in slot p mod slots. A windowed layer has as many slots as its
window, a full one as many as the context, so memory is what the architecture promises. Rows of a batch have prompts
of their own length, padded on the right; what a row's slots hold follows from its length.

Left out: quantised caches, and admission of new requests while others run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.model.network import (
    ExpertMask,
    Window,
    attention_block,
    attention_output,
    embed,
    head_logits,
    moe_block,
    project_qkv,
)
from puzzle_jax.model.rope import RopeTable, rope_table
from puzzle_jax.model.spec import Params


class LayerCache(NamedTuple):
    """Rotated keys, and values, of one layer."""

    k: Float[Array, "batch slots kv_heads dim"]
    v: Float[Array, "batch slots kv_heads dim"]


def cache_slots(window: int | None, context: int) -> int:
    """Slots that a layer needs for a context of so many tokens."""
    return context if window is None else min(window, context)


def cache_bytes(config: ModelConfig, context: int, bytes_per_value: int) -> int:
    """Bytes of one request's cache over all layers."""
    slots = sum(cache_slots(block.window, context) for block in config.blocks)
    return slots * 2 * config.kv_width * bytes_per_value


def init_cache(config: ModelConfig, layer: int, batch: int, context: int, dtype: jnp.dtype | type) -> LayerCache:
    """An empty cache of one layer."""
    shape = (batch, cache_slots(config.blocks[layer].window, context), config.num_kv_heads, config.head_dim)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def fill_cache(
    k: Float[Array, "batch seq kv_heads dim"],
    v: Float[Array, "batch seq kv_heads dim"],
    lengths: Int[Array, "batch"],
    slots: int,
) -> LayerCache:
    """The ring after a prompt: each slot gets the row's last position that belongs there."""
    last = lengths[:, None] - 1
    position = last - (last - jnp.arange(slots)[None, :]) % slots
    position = jnp.clip(position, 0, k.shape[1] - 1)[:, :, None, None]  # slots before position 0 are never visible
    return LayerCache(jnp.take_along_axis(k, position, axis=1), jnp.take_along_axis(v, position, axis=1))


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "batch seq"],
    lengths: Int[Array, "batch"],
    context: int,
    *,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    """Runs prompts and fills the caches.

    Args:
      tokens: prompts, padded on the right.
      lengths: tokens of each prompt, at least 1.
      context: positions that the caches must hold, the generated ones included.
      windows, expert_masks: a view, as in `network.hidden_states`; caches keep the configuration's own sizes.

    Returns:
      Logits after each prompt's last token, and one cache per layer.
    """
    table = rope_table(config.rope, config.head_dim, jnp.arange(tokens.shape[1])[None])
    x = embed(params, tokens)
    caches = []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            window = block.window if windows is None else windows[index]
            x, qkv = attention_block(layer["attention"], config, x, table, window=window)
            mask = None if expert_masks is None else expert_masks[index]
            x, _ = moe_block(layer["moe"], config, x, expert_mask=mask)
            caches.append(fill_cache(qkv.k, qkv.v, lengths, cache_slots(block.window, context)))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return head_logits(params, config, last), caches


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
        slot = positions % cache.k.shape[1]
        cache = LayerCache(
            cache.k.at[rows, slot].set(qkv.k[:, 0].astype(cache.k.dtype)),
            cache.v.at[rows, slot].set(qkv.v[:, 0].astype(cache.v.dtype)),
        )
    with jax.named_scope("attention"):
        out = decode_attention(qkv.q[:, 0], cache.k, cache.v, attention["sinks"], positions, window=window)
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
) -> tuple[Float[Array, "batch vocab"], list[LayerCache]]:
    """Logits after one more token per row, which stands at `positions`, and the caches that hold it."""
    table = rope_table(config.rope, config.head_dim, positions[:, None])
    x = embed(params, tokens[:, None])
    new_caches = []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            window = block.window if windows is None else windows[index]
            x, cache = decode_attention_block(
                layer["attention"], config, x, caches[index], positions, table, window=window
            )
            mask = None if expert_masks is None else expert_masks[index]
            x, _ = moe_block(layer["moe"], config, x, expert_mask=mask)
            new_caches.append(cache)
    return head_logits(params, config, x[:, 0]), new_caches
