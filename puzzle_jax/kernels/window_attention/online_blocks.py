"""`window_attention` for long sequences: blocks of queries, each against one block of keys after another.

The softmax runs online (Milakov and Gimelshein, arXiv 1805.02867), so that logits exist for one pair of blocks at a
time; the backward pass recomputes the weights from the log of their total (FlashAttention, arXiv 2205.14135):

    lse' = log(exp(sink) + sum exp(logits))        p = exp(logits - lse')        delta = out . d_out
    d_logits = p (d_p - delta)                     d_sink = -sum exp(sink - lse') delta

Blocks of keys that no query of a block sees are skipped; any window works, including one per row of the batch as data.
Memory grows with the sequence. Plain XLA, for every platform; it loops instead of doing one large matmul, so it is for
sequences whose logits would be too many (`reference.MOST_LOGITS`). Left out: skipping blocks of other segments.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from puzzle_jax.kernels.shapes import Array, Float, Int, Keys, Queries, Segments, Sinks, Window
from puzzle_jax.kernels.window_attention.reference import MASKED, OnlineSoftmax, start_online

BLOCK = 1024


def window_attention(
    q: Queries, k: Keys, v: Keys, sinks: Sinks, *, window: Window, segment_ids: Segments = None, block: int = BLOCK
) -> Queries:
    """See the api; `block` is the number of queries, and of keys, that are processed together."""
    batch, seq, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    block = min(block, seq)
    count = -(-seq // block)

    def blocks(x: Array) -> Array:
        """[blocks, batch, block, ...]; keys past the end come after every query."""
        x = jnp.pad(x, [(0, 0), (0, count * block - seq)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    # Batched matmuls want [batch, rows, columns]: rows of one key-value head are (position, head in group).
    rows = blocks((q * dim**-0.5).astype(q.dtype)).reshape(count, batch, block, kv_heads, group, dim)
    rows = rows.transpose(0, 1, 3, 2, 4, 5).reshape(count, batch, kv_heads, block * group, dim)
    keys, values = (blocks(x).transpose(0, 1, 3, 2, 4) for x in (k, v))
    widths = jnp.asarray(count * block if window is None else window, jnp.int32).reshape(-1)
    segments = None if segment_ids is None else blocks(segment_ids)
    sink = jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, group), block)  # of each row
    out = _attend(rows, keys, values, sink, widths, segments)
    out = out.reshape(count, batch, kv_heads, block, group, dim).transpose(1, 0, 3, 2, 4, 5)
    return out.reshape(batch, count * block, heads, dim)[:, :seq].astype(q.dtype)


@jax.custom_vjp
def _attend(
    rows: Float[Array, "blocks batch kv_heads rows dim"],
    keys: Float[Array, "blocks batch kv_heads block dim"],
    values: Float[Array, "blocks batch kv_heads block dim"],
    sink: Float[Array, "kv_heads rows"],
    widths: Int[Array, "#batch"],
    segments: Int[Array, "blocks batch block"] | None,
) -> Float[Array, "blocks batch kv_heads rows dim"]:
    return _forward(rows, keys, values, sink, widths, segments)[0]


def _forward(
    rows: Array, keys: Array, values: Array, sink: Array, widths: Array, segments: Array | None
) -> tuple[Array, tuple[Array, ...]]:
    visible = _Visible(keys.shape[3], rows.shape[3], widths, segments)

    def one(index: Array) -> tuple[Array, Array]:
        def meet(at: Array, seen: OnlineSoftmax) -> OnlineSoftmax:
            return seen.after(_logits(rows[index], keys[at]) + visible(index, at), values[at])

        start = start_online(jnp.broadcast_to(sink, rows.shape[1:4]), rows.shape[4])
        seen = jax.lax.fori_loop(visible.first(index), index + 1, meet, start)
        return (seen.out / seen.total[..., None]).astype(rows.dtype), seen.largest + jnp.log(seen.total)

    out, log_totals = jax.lax.map(one, jnp.arange(len(rows)))
    return out, (rows, keys, values, sink, widths, *([] if segments is None else [segments]), out, log_totals)


def _backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array | None, ...]:
    rows, keys, values, sink, widths, *segments, out, log_totals = saved
    visible = _Visible(keys.shape[3], rows.shape[3], widths, segments[0] if segments else None)
    deltas = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)

    def one(sums: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        def meet(at: Array, found: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            d_rows, d_keys, d_values = found
            weights = jnp.exp(_logits(rows[index], keys[at]) + visible(index, at) - log_totals[index][..., None])
            d_weights = _logits(d_out[index], values[at])
            d_logits = (weights * (d_weights - deltas[index][..., None])).astype(rows.dtype)
            d_rows = d_rows + jnp.matmul(d_logits, keys[at], preferred_element_type=jnp.float32)
            d_keys = d_keys.at[at].add(_over_rows(d_logits, rows[index]))
            d_values = d_values.at[at].add(_over_rows(weights.astype(rows.dtype), d_out[index]))
            return d_rows, d_keys, d_values

        nothing = jnp.zeros(rows.shape[1:], jnp.float32)
        d_rows, d_keys, d_values = jax.lax.fori_loop(visible.first(index), index + 1, meet, (nothing, *sums))
        return (d_keys, d_values), d_rows.astype(rows.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32)
    (d_keys, d_values), d_rows = jax.lax.scan(one, zeros, jnp.arange(len(rows)))
    d_sink = -jnp.sum(jnp.exp(sink - log_totals) * deltas, axis=(0, 1))
    return d_rows, d_keys.astype(keys.dtype), d_values.astype(values.dtype), d_sink, None, None


_attend.defvjp(_forward, _backward)


class _Visible(NamedTuple):
    """The keys that queries see, block by block."""

    block: int
    rows: int
    widths: Int[Array, "#batch"]
    segments: Int[Array, "blocks batch block"] | None

    def first(self, index: Array) -> Array:
        """The first block with a key that a block of queries sees."""
        return jnp.maximum(index * self.block - jnp.max(self.widths) + 1, 0) // self.block

    def __call__(self, index: Array, at: Array) -> Float[Array, "#batch one rows block"]:
        """The mask that is added to the logits of a block of queries and one of keys."""
        place = jnp.arange(self.block)
        query, key = (index * self.block + place)[:, None], (at * self.block + place)[None]
        mask = (key <= query) & (key > query - self.widths[:, None, None])
        if self.segments is not None:
            mask = mask & (self.segments[index][:, :, None] == self.segments[at][:, None])
        return jnp.where(jnp.repeat(mask, self.rows // self.block, axis=1), 0.0, MASKED)[:, None]


def _logits(rows: Array, keys: Array) -> Float[Array, "batch kv_heads rows block"]:
    return jnp.einsum("bkrd,bksd->bkrs", rows, keys, preferred_element_type=jnp.float32)


def _over_rows(weights: Array, rows: Array) -> Float[Array, "batch kv_heads block dim"]:
    return jnp.einsum("bkrs,bkrd->bksd", weights, rows, preferred_element_type=jnp.float32)
