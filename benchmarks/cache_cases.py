"""The cases of attention against a cache that `kernels.py` times: a decode step, and chunks of tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from case import Case, normal

from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.float8 import encode_e4m3


def cached(small: bool) -> list[Case]:
    """One token of each of 16 rows against 65,536 cached tokens, and against a ring of 128."""
    return [
        _cached(slots, form, small) for slots in ((256, 128) if small else (65_536, 128)) for form in ("bf16", "e4m3")
    ]


def _cached(slots: int, form: str, small: bool) -> Case:
    batch, heads, kv_heads, dim = (2, 4, 2, 64) if small else (16, 64, 8, 64)
    k, v = normal(8, (batch, kv_heads, dim, slots)), normal(9, (batch, kv_heads, slots, dim))
    scale, scales = jnp.float32(0.02), {}
    if form == "e4m3":
        k, v = (jax.jit(encode_e4m3)(x, scale) for x in (k, v))
        scales = {"k_scale": scale, "v_scale": scale}
    positions = jnp.full((batch,), slots - 1 if slots > 128 else 1000, jnp.int32)

    def attend(*given: Any, name: str) -> jax.Array:
        return decode_attention(*given, window=None, implementation=name, **scales)

    def expected(q: Any, k: Any, v: Any, *given: Any) -> jax.Array:
        k, v = (x if form == "e4m3" else x.astype(jnp.float32) for x in (k, v))
        return attend(q.astype(jnp.float32), k, v, *given, name="reference")

    return Case(
        f"decode attention, {batch} rows, {slots} slots, {heads} heads of {dim} on {kv_heads}, {form}",
        (normal(10, (batch, heads, dim)), k, v, normal(11, (heads,), jnp.float32), positions),
        {name: partial(attend, name=name) for name in ("mosaic_gpu", "reference")},
        expected,
        lambda out: out,
        4.0 * batch * heads * dim * slots,
        2.0 * batch * kv_heads * dim * slots * (1 if form == "e4m3" else 2),
    )


def chunks(small: bool) -> list[Case]:
    """A prompt chunk after a long cache, and a few tokens of each of 16 rows."""
    shapes = ((1, 8, 256), (2, 3, 256)) if small else ((1, 512, 65_536), (16, 8, 65_536))
    return [_chunk(*shape, form, small) for shape in shapes for form in ("bf16", "e4m3")]


def _chunk(batch: int, tokens: int, slots: int, form: str, small: bool) -> Case:
    heads, kv_heads, dim = (4, 2, 64) if small else (64, 8, 64)
    shapes = ((dim, tokens), (tokens, dim), (dim, slots), (slots, dim))
    held = [normal(15 + seed, (batch, kv_heads, *shape)) for seed, shape in enumerate(shapes)]
    scale, scales = jnp.float32(0.02), {}
    if form == "e4m3":
        held = [jax.jit(encode_e4m3)(x, scale) for x in held]
        scales = {"k_scale": scale, "v_scale": scale}
    some = min(tokens, 4)

    def attend(*given: Any, name: str) -> jax.Array:
        return chunk_attention(*given, window=None, implementation=name, **scales)

    def expected(q: Any, *given: Any) -> jax.Array:
        *held, sinks, start = given
        k, v, k_cache, v_cache = (x if form == "e4m3" else x.astype(jnp.float32) for x in held)
        first = q[:, :some].astype(jnp.float32), k[..., :some], v[:, :, :some]
        return attend(*first, k_cache, v_cache, sinks, start, name="reference")

    start = jnp.full((batch,), slots, jnp.int32)
    size = 1 if form == "e4m3" else 2
    return Case(
        f"chunk attention, {batch} rows of {tokens} tokens, {slots} slots, {heads} heads of {dim}, {form}",
        (normal(19, (batch, tokens, heads, dim)), *held, normal(20, (heads,), jnp.float32), start),
        {name: partial(attend, name=name) for name in ("mosaic_gpu", "blocks")},
        expected,
        lambda out: out[:, :some],
        4.0 * batch * heads * dim * tokens * (slots + tokens / 2),
        2.0 * batch * dim * (kv_heads * (slots + tokens) * size + 2 * heads * tokens),
    )
