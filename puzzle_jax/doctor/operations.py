"""The operations of a model of given sizes, as generation, search and training call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.dispatch import Choice, recording
from puzzle_jax.kernels.expert_mlp import Experts, expert_outputs
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import route
from puzzle_jax.kernels.window_attention import window_attention

_Abstract: Any = jax.ShapeDtypeStruct
DECODED = 64
"""Tokens of one decoding step."""

CHUNK = 512
"""Tokens in a chunk of a prompt, unless the cache has fewer slots."""


class Operation(NamedTuple):
    """One operation on arrays of given shapes: its name, its function, and its arguments without values."""

    name: str
    run: Callable[..., PyTree]
    arrays: tuple[PyTree, ...]


def choice(operation: Operation) -> Choice:
    """Returns what serves an operation here, after trying kernels that were not yet tried on this device."""
    with recording() as choices:
        jax.eval_shape(operation.run, *operation.arrays)
    return choices[-1]  # the operation itself: those that it is made of record their choices first


def operations(config: ModelConfig, tokens: int, slots: int) -> Iterator[Operation]:
    """Yields the operations of a model.

    Args:
      tokens: tokens of a batch that is scored or trained on.
      slots: positions in the cache of a layer with full attention.
    """
    dtype = jnp.dtype(jnp.float32 if target_platform() == "cpu" else jnp.bfloat16)
    windows = sorted({block.window for block in config.blocks}, key=lambda window: window or 0)
    experts = max(block.num_experts for block in config.blocks)
    forms = {"bfloat16" if dtype == jnp.bfloat16 else "float32": False, "MXFP4": True}
    if config.hidden_size % GROUP or config.intermediate_size % GROUP:
        del forms["MXFP4"]
    for count in (DECODED, tokens):
        logits = _Abstract((count, experts), jnp.float32)
        yield Operation(f"routing, {count:,} tokens", partial(route, k=config.experts_per_token), (logits,))
    for name, packed in forms.items():
        for count in (DECODED, tokens):
            yield _mixture(f"experts, {name}, {count:,} tokens", config, experts, count, packed, dtype)
    for window in windows:
        for segments in (False, True):
            seen = "all keys" if window is None else f"window {window:,}"
            name = f"attention, {tokens:,} tokens, {seen}{', packed sequences' if segments else ''}"
            yield _attention(name, config, tokens, window, segments, dtype)
    for window in windows:
        for form, stored in ((dtype.name, dtype), ("e4m3", jnp.dtype(jnp.uint8))):
            own = slots if window is None else min(window, slots)
            name = f"cache of {own:,} slots, {form}"
            yield _chunk(f"prefill, {name}", config, min(CHUNK, slots), own, window, stored, dtype)
            yield _decoding(f"decoding, {name}", config, own, window, stored, dtype)


def _mixture(name: str, config: ModelConfig, experts: int, tokens: int, packed: bool, dtype: jnp.dtype) -> Operation:
    hidden, inter = config.hidden_size, config.intermediate_size

    def matrices(inputs: int, outputs: int) -> PyTree:
        if not packed:
            return _Abstract((experts, inputs, outputs), dtype)
        codes, scales = (_Abstract((experts, outputs, inputs // each), jnp.uint8) for each in (2, GROUP))
        return MXFP4(codes, scales)

    biases = (_Abstract((experts, size), dtype) for size in (2 * inter, hidden))
    layer = Experts(matrices(hidden, 2 * inter), next(biases), matrices(inter, hidden), next(biases))
    arrays = _Abstract((tokens, hidden), dtype), _Abstract((tokens, config.experts_per_token), jnp.int32), layer
    return Operation(name, partial(expert_outputs, limit=config.swiglu_limit), arrays)


def _attention(
    name: str, config: ModelConfig, tokens: int, window: int | None, segments: bool, dtype: jnp.dtype
) -> Operation:
    def attend(q: PyTree, k: PyTree, v: PyTree, sinks: PyTree, ids: PyTree) -> PyTree:
        return window_attention(q, k, v, sinks, window=window, segment_ids=ids if segments else None)

    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = tuple(_Abstract((1, tokens, count, config.head_dim), dtype) for count in heads)
    more = _Abstract((config.num_heads,), dtype), _Abstract((1, tokens), jnp.int32)
    return Operation(name, attend, (*qkv, *more))


def _chunk(
    name: str, config: ModelConfig, chunk: int, slots: int, window: int | None, stored: jnp.dtype, dtype: jnp.dtype
) -> Operation:
    def attend(*given: PyTree) -> PyTree:
        *arrays, scale = given
        scales = {"k_scale": scale, "v_scale": scale} if stored == jnp.uint8 else {}
        return chunk_attention(*arrays, window=window, **scales)

    dim, kv_heads = config.head_dim, config.num_kv_heads
    shapes = ((dim, chunk), (chunk, dim), (dim, slots), (slots, dim))
    held = (_Abstract((1, kv_heads, *shape), stored) for shape in shapes)
    more = _Abstract((config.num_heads,), dtype), _Abstract((), jnp.int32), _Abstract((), jnp.float32)
    return Operation(name, attend, (_Abstract((1, chunk, config.num_heads, dim), dtype), *held, *more))


def _decoding(
    name: str, config: ModelConfig, slots: int, window: int | None, stored: jnp.dtype, dtype: jnp.dtype
) -> Operation:
    def attend(q: PyTree, k: PyTree, v: PyTree, sinks: PyTree, positions: PyTree, scale: PyTree) -> PyTree:
        scales = {"k_scale": scale, "v_scale": scale} if stored == jnp.uint8 else {}
        return decode_attention(q, k, v, sinks, positions, window=window, **scales)

    batch, dim, kv_heads = DECODED, config.head_dim, config.num_kv_heads
    rings = (_Abstract((batch, kv_heads, *shape), stored) for shape in ((dim, slots), (slots, dim)))
    more = _Abstract((config.num_heads,), dtype), _Abstract((batch,), jnp.int32), _Abstract((), jnp.float32)
    return Operation(name, attend, (_Abstract((batch, config.num_heads, dim), dtype), *rings, *more))
