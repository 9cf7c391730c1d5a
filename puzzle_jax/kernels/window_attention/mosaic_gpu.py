"""`window_attention` on Hopper GPUs, forwards and backwards, in Pallas' Mosaic GPU.

Forwards, one program per row of the batch, query head and block of queries goes over the tiles of keys that the block
can see, with an online softmax that starts from the sink, as from one more key without a value. It also returns
lse' = log(exp(sink) + sum of exp(logits)) per query.

Backwards, with delta = sum of out * d_out per query, all probabilities are recomputed from lse', so nothing quadratic
is kept (T. Dao, FlashAttention-2, 2023):

    p = exp(logits - lse')   d_v = p' d_out   d_logits = p (d_out v' - delta)   d_sink = -sum exp(sink - lse') delta

One kernel sums d_q over the keys of a block of queries; another sums d_k and d_v over the queries of a block of keys
and the query heads that share them. Which tiles a block sees first and last is data: it follows from the window, which
may be data too, and from the smallest and largest segment of each tile. So the cost grows with the window and, for
packed sequences, with their lengths rather than the row's.

Left out: warp specialisation and more than 64 queries per program, except in the forward pass of `mosaic_wide`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, product, stored, swizzled
from puzzle_jax.kernels.shapes import Array, Float, Index, Int, Keys, Queries, Ref, Rows, Segments, Sinks, Window
from puzzle_jax.kernels.window_attention import mosaic_wide
from puzzle_jax.kernels.window_attention.mosaic_shape import TILE, Shape, Tiles
from puzzle_jax.kernels.window_attention.reference import MASKED

STEPS = 2

Place = Callable[..., tuple[Array, Array]]
Carry = TypeVar("Carry")


def wide_attention(*arrays: Array, window: Window, segment_ids: Segments = None, interpret: bool = False) -> Queries:
    """`window_attention` with the forward pass of `mosaic_wide`. Also raises NotImplementedError for windows that are
    data or below `mosaic_wide.MIN_REACH`, and for sequences of at most half of that."""
    least, seq = mosaic_wide.MIN_REACH, arrays[0].shape[1]
    if 2 * seq <= least:
        raise NotImplementedError(f"for more than {least // 2} tokens, but these are {seq}")
    if not (window is None or (isinstance(window, int) and window >= min(least, seq))):
        raise NotImplementedError(f"for all keys or windows of {least} or more, but this is {window}")
    return window_attention(*arrays, window=window, segment_ids=segment_ids, interpret=interpret, wide=True)


def window_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks,
    *,
    window: Window,
    segment_ids: Segments = None,
    interpret: bool = False,
    wide: bool = False,
) -> Queries:
    """See the api. Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, for dtypes other
    than bfloat16, and for head sizes that are not a multiple of 64 up to 128."""
    hopper_only(interpret)
    if {q.dtype, k.dtype, v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"for bfloat16, but this is {q.dtype}, {k.dtype}, {v.dtype}")
    batch, seq, heads, dim = q.shape
    if dim % 64 or dim > 128:
        raise NotImplementedError(f"heads of {dim} are no multiple of 64 up to 128")
    padding = -seq % (mosaic_wide.QUERIES if wide else TILE)
    if padding:  # queries and keys after all others, which see none of them
        q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, padding)), mode="edge")
    windowed = window is not None and not (isinstance(window, int) and window >= seq)
    shape = Shape(batch, seq + padding, heads, k.shape[2], dim, windowed, segment_ids is not None, interpret, wide)
    width = jnp.asarray(window if windowed else seq, jnp.int32).reshape(-1)
    widths = jnp.broadcast_to(jnp.minimum(width, seq), (batch,))
    segments = jnp.zeros((batch, seq + padding), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
    out: Array = _attend(shape, q, k, v, sinks.astype(jnp.float32), segments, widths)
    return out[:, :seq]


class _Seen(NamedTuple):
    """Limits of what a query may see: segments, each row's window, and the tiles of both, see `Shape.bounds`."""

    segments: Int[Array, "batch seq"]
    widths: Rows
    first: Tiles
    last: Tiles


def _seen(shape: Shape, segments: Array, widths: Array) -> _Seen:
    return _Seen(segments, widths, *shape.bounds(segments, widths))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape: Shape, q: Array, k: Array, v: Array, sinks: Array, segments: Array, widths: Array) -> Array:
    return _forward(shape, q, k, v, sinks, _seen(shape, segments, widths))[0]


def _save(
    shape: Shape, q: Array, k: Array, v: Array, sinks: Array, segments: Array, widths: Array
) -> tuple[Array, tuple[object, ...]]:
    seen = _seen(shape, segments, widths)
    out, lse = _forward(shape, q, k, v, sinks, seen)
    return out, (q, k, v, sinks, seen, out, lse)


def _backward(shape: Shape, saved: tuple[Any, ...], d_out: Array) -> tuple[Array | None, ...]:
    q, k, v, sinks, seen, out, lse = saved
    delta = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32)
    d_sinks = -jnp.einsum("bhq,bhq->h", jnp.exp(sinks[:, None] - lse), delta)
    d_q = _d_queries(shape, q, k, v, seen, d_out, lse, delta)
    d_k, d_v = _d_keys(shape, q, k, v, seen, d_out, lse, delta)
    return d_q, d_k, d_v, d_sinks, None, None


_attend.defvjp(_save, _backward)


# What the kernels share ----------------------------------------------------------------------------------------------


class _Tools:
    """Building blocks of a kernel whose tiles are [TILE, TILE] logits and [TILE, dim] vectors."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.mosaic = shape, plgpu()
        self.matrix = self.mosaic.Layout.WGMMA
        self.by_row, self.by_column = self.matrix.reduce(1), self.matrix.reduce(0)

    def rows(self, values: Array, columns: int = TILE) -> Array:
        """A value per row, in all columns."""
        return lax.broadcast_in_dim(self.mosaic.layout_cast(values, self.by_row), (TILE, columns), (0,))

    def columns(self, values: Array) -> Array:
        """A value per column, in all rows."""
        return lax.broadcast_in_dim(self.mosaic.layout_cast(values, self.by_column), (TILE, TILE), (1,))

    def numbers(self, axis: int) -> Array:
        return self.mosaic.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=self.matrix)

    def seen(
        self, query_axis: int, queries: Index, keys: Index, width: Array, query_segment: Ref, key_segment: Ref
    ) -> Array:
        """Returns a mask of the keys of a tile that each query of a block sees; queries lie along `query_axis`."""
        query = self.numbers(query_axis) + queries * TILE
        key = self.numbers(1 - query_axis) + keys * TILE
        mask = key <= query
        if self.shape.windowed:
            mask = mask & (key > query - width)
        if self.shape.segments:
            spread = (self.rows, self.columns)
            same = spread[query_axis](query_segment[...]) == spread[1 - query_axis](key_segment[...])
            mask = mask & same
        return mask & (query < self.shape.seq) if query_axis else mask  # past the end, the last tile comes again

    def fetched(self, copies: Sequence[tuple[Ref, Ref]], arrived: Ref) -> None:
        for source, target in copies:
            self.mosaic.copy_gmem_to_smem(source, target, arrived)
            self.mosaic.barrier_wait(arrived)

    def vectors(self) -> object:
        """A tile [TILE, dim] of shared memory."""
        return self.mosaic.SMEM((TILE, self.shape.dim), jnp.bfloat16, transforms=swizzled(self.shape.dim))

    def logits(self) -> object:
        """A tile [TILE, TILE] of shared memory, from which a matmul reads."""
        return self.mosaic.SMEM((TILE, TILE), jnp.bfloat16, transforms=swizzled(TILE))

    def scalars(self, dtype: type = jnp.float32) -> object:
        return self.mosaic.SMEM((TILE,), dtype)

    def zeros(self) -> Array:
        return self.mosaic.layout_cast(jnp.zeros((TILE, self.shape.dim), jnp.float32), self.matrix)

    def vector_tiles(self, place: Place) -> object:
        """Tiles of [seq, heads, dim], where `place` gives tile and head."""
        block = (TILE, None, self.shape.dim)
        return self.mosaic.BlockSpec(block, lambda *i: (*place(*i), 0), transforms=swizzled(self.shape.dim))

    def scalar_tiles(self, place: Place) -> object:
        """Tiles of [heads, seq], where `place` gives tile and head."""
        return self.mosaic.BlockSpec((None, TILE), lambda *i: place(*i)[::-1])

    def pipeline(
        self, step: Callable[..., Carry], grid: tuple[Index, ...], specs: Sequence[object], carry: Carry
    ) -> Callable[..., Carry]:
        return self.mosaic.emit_pipeline(
            step, grid=grid, in_specs=list(specs), max_concurrent_steps=STEPS, init_carry=carry
        )

    def segment_tiles(self, place: Place) -> object:
        return self.mosaic.BlockSpec((TILE,), lambda *i: place(*i)[:1])

    def over_keys(
        self, step: Callable[..., Carry], first: Array, queries: Array, head: Array, carry: Carry
    ) -> Callable[..., Carry]:
        """A pipeline over tiles of keys, values and segments, from the first that a block of queries sees."""

        def place(n: Index) -> tuple[Array, Array]:
            return jnp.minimum(first + n, self.shape.tiles - 1), lax.div(head, self.shape.heads // self.shape.kv_heads)

        steps = self.shape.tiles if self.shape.interpret else queries - first + 1
        specs = [self.vector_tiles(place), self.vector_tiles(place), self.segment_tiles(place)]
        return self.pipeline(step, (steps,), specs, carry)

    def call(
        self, kernel: Callable[..., None], outputs: Sequence[object], heads: int, scratch: Sequence[object]
    ) -> Callable[..., Array]:
        """A kernel with a program per row of the batch, head and tile of the sequence."""
        grid = {"row": self.shape.batch, "head": heads, "tile": self.shape.tiles}
        return launched(kernel, list(outputs), grid, list(scratch), self.shape.interpret)


def _product(left: Ref, right: Ref, columns: int) -> Float[Array, "tile columns"]:
    return product(left, right, TILE, columns)


def _here() -> tuple[Array, Array, Array]:
    return lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")


# Forwards ------------------------------------------------------------------------------------------------------------


def _forward(
    shape: Shape, q: Array, k: Array, v: Array, sinks: Array, visible: _Seen
) -> tuple[Queries, Float[Array, "batch heads seq"]]:
    """Output and lse'."""
    if shape.wide:
        return mosaic_wide.forward(shape, q, k, v, sinks, visible.segments, visible.widths, visible.first)
    tools, dim = _Tools(shape), shape.dim

    def kernel(
        sink_of: Ref,
        first_of: Ref,
        width_of: Ref,
        q_all: Ref,
        k_all: Ref,
        v_all: Ref,
        segment_of: Ref,
        out: Ref,
        lse: Ref,
        *tiles: Ref,
    ) -> None:
        q_tile, p_tile, out_tile, lse_tile, own_segment, arrived = tiles
        b, h, i = _here()
        first, width, here = first_of[b, i], width_of[b], pl.ds(i * TILE, TILE)
        tools.fetched([(q_all.at[b, here, h], q_tile), (segment_of.at[b, here], own_segment)], arrived)

        def step(
            index: tuple[Index, ...], k_tile: Ref, v_tile: Ref, segment: Ref, carry: tuple[Array, ...]
        ) -> tuple[Array, ...]:
            largest, total, vectors = carry
            logits = _product(q_tile, k_tile.T, TILE) * dim**-0.5
            seen = tools.seen(0, i, first + index[0], width, own_segment, segment)
            logits = jnp.where(seen, logits, MASKED)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.where(seen, jnp.exp(logits - tools.rows(new)), 0.0)
            shrink = jnp.exp(largest - new)
            p_tile[...] = weights.astype(jnp.bfloat16)
            tools.mosaic.commit_smem()
            vectors = vectors * tools.rows(shrink, dim) + _product(p_tile, v_tile, dim)
            return new, total * shrink + jnp.sum(weights, axis=1), vectors

        start = lax.broadcast_in_dim(sink_of[h], (TILE,), ())
        carry = (
            tools.mosaic.layout_cast(start, tools.by_row),
            tools.mosaic.layout_cast(jnp.ones((TILE,), jnp.float32), tools.by_row),
            tools.zeros(),
        )
        run = tools.over_keys(step, first, i, h, carry)
        largest, total, vectors = run(k_all.at[b], v_all.at[b], segment_of.at[b])
        out_tile[...] = (vectors / tools.rows(total, dim)).astype(out_tile.dtype)
        lse_tile[...] = largest + jnp.log(total)
        stored((out_tile, out.at[b, here, h]), (lse_tile, lse.at[b, h, here]))

    per_query = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.seq), jnp.float32)
    scratch = [tools.vectors(), tools.logits(), tools.vectors(), tools.scalars(), tools.scalars(jnp.int32)]
    call = tools.call(
        kernel, [jax.ShapeDtypeStruct(q.shape, q.dtype), per_query], shape.heads, [*scratch, tools.mosaic.Barrier()]
    )
    out, lse = call(sinks, visible.first, visible.widths, q, k, v, visible.segments)
    return out, lse


# Backwards -----------------------------------------------------------------------------------------------------------


def _d_queries(
    shape: Shape, q: Array, k: Array, v: Array, visible: _Seen, d_out: Array, lse: Array, delta: Array
) -> Queries:
    tools, dim = _Tools(shape), shape.dim

    def kernel(*refs: Ref) -> None:
        first_of, width_of, q_all, k_all, v_all, segment_of, d_out_all, lse_of, delta_of, d_q, *tiles = refs
        q_tile, d_out_tile, lse_tile, delta_tile, own_segment, d_tile, d_q_tile, arrived = tiles
        b, h, i = _here()
        first, width, here = first_of[b, i], width_of[b], pl.ds(i * TILE, TILE)
        tools.fetched(
            [
                (q_all.at[b, here, h], q_tile),
                (d_out_all.at[b, here, h], d_out_tile),
                (lse_of.at[b, h, here], lse_tile),
                (delta_of.at[b, h, here], delta_tile),
                (segment_of.at[b, here], own_segment),
            ],
            arrived,
        )

        def step(index: tuple[Index, ...], k_tile: Ref, v_tile: Ref, segment: Ref, total: Array) -> Array:
            logits = _product(q_tile, k_tile.T, TILE) * dim**-0.5
            seen = tools.seen(0, i, first + index[0], width, own_segment, segment)
            weights = jnp.where(seen, jnp.exp(logits - tools.rows(lse_tile[...])), 0.0)
            d_weights = _product(d_out_tile, v_tile.T, TILE)
            d_logits = weights * (d_weights - tools.rows(delta_tile[...])) * dim**-0.5
            d_tile[...] = d_logits.astype(jnp.bfloat16)
            tools.mosaic.commit_smem()
            return total + _product(d_tile, k_tile, dim)

        run = tools.over_keys(step, first, i, h, tools.zeros())
        d_q_tile[...] = run(k_all.at[b], v_all.at[b], segment_of.at[b]).astype(d_q_tile.dtype)
        stored((d_q_tile, d_q.at[b, here, h]))

    scratch = [tools.vectors(), tools.vectors(), tools.scalars(), tools.scalars(), tools.scalars(jnp.int32)]
    scratch += [tools.logits(), tools.vectors(), tools.mosaic.Barrier()]
    call = tools.call(kernel, [jax.ShapeDtypeStruct(q.shape, q.dtype)], shape.heads, scratch)
    return call(visible.first, visible.widths, q, k, v, visible.segments, d_out, lse, delta)[0]


def _d_keys(
    shape: Shape, q: Array, k: Array, v: Array, visible: _Seen, d_out: Array, lse: Array, delta: Array
) -> tuple[Keys, Keys]:
    """Logits are transposed here: keys are rows and queries columns."""
    tools, dim, group = _Tools(shape), shape.dim, shape.heads // shape.kv_heads

    def kernel(*refs: Ref) -> None:
        last_of, width_of, q_all, k_all, v_all, segment_of, d_out_all, lse_of, delta_of, d_k, d_v, *tiles = refs
        k_tile, v_tile, own_segment, p_tile, d_tile, d_k_tile, d_v_tile, arrived = tiles
        b, kv_head, j = _here()
        width, here = width_of[b], pl.ds(j * TILE, TILE)
        own = [(k_all.at[b, here, kv_head], k_tile), (v_all.at[b, here, kv_head], v_tile)]
        tools.fetched([*own, (segment_of.at[b, here], own_segment)], arrived)

        def place(member: Index, n: Index) -> tuple[Array, Array]:
            return jnp.minimum(j + n, shape.tiles - 1), kv_head * group + member

        def step(
            index: tuple[Index, ...],
            q_tile: Ref,
            d_out_tile: Ref,
            lse_tile: Ref,
            delta_tile: Ref,
            segment: Ref,
            carry: tuple[Array, Array],
        ) -> tuple[Array, Array]:
            of_k, of_v = carry
            logits = _product(k_tile, q_tile.T, TILE) * dim**-0.5
            seen = tools.seen(1, j + index[1], j, width, segment, own_segment)
            weights = jnp.where(seen, jnp.exp(logits - tools.columns(lse_tile[...])), 0.0)
            d_weights = _product(v_tile, d_out_tile.T, TILE)
            d_logits = weights * (d_weights - tools.columns(delta_tile[...])) * dim**-0.5
            p_tile[...] = weights.astype(jnp.bfloat16)
            d_tile[...] = d_logits.astype(jnp.bfloat16)
            tools.mosaic.commit_smem()
            return of_k + _product(d_tile, q_tile, dim), of_v + _product(p_tile, d_out_tile, dim)

        steps = shape.tiles if shape.interpret else last_of[b, j] - j + 1
        tiles_of = [*[tools.vector_tiles(place)] * 2, *[tools.scalar_tiles(place)] * 2, tools.segment_tiles(place)]
        run = tools.pipeline(step, (group, steps), tiles_of, (tools.zeros(), tools.zeros()))
        of_k, of_v = run(q_all.at[b], d_out_all.at[b], lse_of.at[b], delta_of.at[b], segment_of.at[b])
        d_k_tile[...], d_v_tile[...] = of_k.astype(jnp.bfloat16), of_v.astype(jnp.bfloat16)
        stored((d_k_tile, d_k.at[b, here, kv_head]), (d_v_tile, d_v.at[b, here, kv_head]))

    scratch = [tools.vectors(), tools.vectors(), tools.scalars(jnp.int32), tools.logits(), tools.logits()]
    scratch += [tools.vectors(), tools.vectors(), tools.mosaic.Barrier()]
    call = tools.call(kernel, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)], shape.kv_heads, scratch)
    d_k, d_v = call(visible.last, visible.widths, q, k, v, visible.segments, d_out, lse, delta)
    return d_k, d_v
