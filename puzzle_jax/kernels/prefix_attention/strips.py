"""`prefix_attention` by strips: each attends to its own keys and, all strips together, to those of the prompt.

Both parts share one softmax. Of the prompt, a window needs only the last `window - 1` keys, which are at the end of the
prefix; so time and memory grow with answers * (strip + visible part of the prefix). Plain XLA, differentiable.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from puzzle_jax.kernels.prefix_attention.layout import PROMPT, Layout
from puzzle_jax.kernels.shapes import Array, Int, Keys, Queries, Sinks
from puzzle_jax.kernels.window_attention import window_attention
from puzzle_jax.kernels.window_attention.reference import MASKED, refuse_too_many


def prefix_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks,
    *,
    layout: Layout,
    window: int | None,
    segment_ids: Int[Array, "batch seq"],
    positions: Int[Array, "batch seq"],
    mesh: Mesh | AbstractMesh | None = None,
) -> Queries:
    """See the api."""
    batch, seq, heads, dim = q.shape
    prefix, strip = layout
    first = 0 if window is None else max(0, prefix - window + 1)  # first of the prompt's keys that an answer may see
    answers, kv_heads = seq - prefix, k.shape[2]
    count, group, seen = answers // strip, heads // kv_heads, prefix - first
    refuse_too_many(batch, heads, answers, strip + seen)
    of_prompt = window_attention(
        q[:, :prefix],
        k[:, :prefix],
        v[:, :prefix],
        sinks,
        window=window,
        segment_ids=segment_ids[:, :prefix],
        mesh=mesh,
    )

    # Query rows of one key-value head are (position, head in group): [batch, kv_heads, strips, strip * group, dim].
    rows = (q[:, prefix:] * dim**-0.5).astype(q.dtype).reshape(batch, count, strip, kv_heads, group, dim)
    rows = rows.transpose(0, 3, 1, 2, 4, 5).reshape(batch, kv_heads, count, strip * group, dim)
    together = rows.reshape(batch, kv_heads, count * strip * group, dim)

    def strips_of(x: Keys) -> Array:
        return x[:, prefix:].reshape(batch, count, strip, kv_heads, dim).transpose(0, 3, 1, 2, 4)

    own_keys, own_values = strips_of(k), strips_of(v)
    prompt_keys, prompt_values = (x[:, first:prefix].transpose(0, 2, 1, 3) for x in (k, v))
    own = jnp.einsum("bkcqd,bkcsd->bkcqs", rows, own_keys, preferred_element_type=jnp.float32)
    shared = jnp.einsum("bkqd,bksd->bkqs", together, prompt_keys, preferred_element_type=jnp.float32)
    own_mask, shared_mask = _masks(layout, window, first, segment_ids, positions)
    by_head = (batch, kv_heads, count, strip, group)
    own = own.reshape(*by_head, strip) + jnp.where(own_mask, 0.0, MASKED)[:, None, :, :, None]
    shared = shared.reshape(*by_head, seen) + jnp.where(shared_mask, 0.0, MASKED)[:, None, :, :, None]

    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, 1, 1, group)
    largest = jnp.maximum(jnp.maximum(jnp.max(own, axis=-1), jnp.max(shared, axis=-1, initial=MASKED)), sink)
    largest = jax.lax.stop_gradient(largest)
    own, shared = jnp.exp(own - largest[..., None]), jnp.exp(shared - largest[..., None])
    total = jnp.sum(own, axis=-1) + jnp.sum(shared, axis=-1) + jnp.exp(sink - largest)
    own = own.astype(v.dtype).reshape(batch, kv_heads, count, strip * group, strip)
    shared = shared.astype(v.dtype).reshape(batch, kv_heads, count * strip * group, seen)
    out = jnp.einsum("bkcqs,bkcsd->bkcqd", own, own_values, preferred_element_type=jnp.float32)
    more = jnp.einsum("bkqs,bksd->bkqd", shared, prompt_values, preferred_element_type=jnp.float32)
    out = (out + more.reshape(out.shape)).reshape(*by_head, dim) / total[..., None]
    out = out.transpose(0, 2, 3, 1, 4, 5).reshape(batch, answers, heads, dim).astype(q.dtype)
    return jnp.concatenate([of_prompt, out], axis=1)


def _masks(layout: Layout, window: int | None, first: int, segment_ids: Array, positions: Array) -> tuple[Array, Array]:
    """Masks of visible keys: in the own strip, [batch, strips, strip, strip], and in the prompt from `first` on."""
    prefix, strip = layout
    batch, seq = segment_ids.shape
    shape = (batch, (seq - prefix) // strip, strip)
    segments, places = segment_ids[:, prefix:].reshape(shape), positions[:, prefix:].reshape(shape)
    causal = jnp.arange(strip)[:, None] >= jnp.arange(strip)[None, :]
    own = causal & (segments[..., :, None] == segments[..., None, :])
    shared = (segment_ids[:, first:prefix] == PROMPT)[:, None, None, :]
    if window is not None:
        own = own & (places[..., :, None] - places[..., None, :] < window)
        shared = shared & (places[..., None] - positions[:, None, None, first:prefix] < window)
    return own, jnp.broadcast_to(shared, (*shape, prefix - first))
