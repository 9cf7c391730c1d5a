"""`chunk_attention` on Hopper GPUs, in Pallas' Mosaic GPU: prompts in chunks, and few tokens for many rows.

The query tokens of a row and the query heads that share a key-value head are the rows of one matrix, of which a program
has 64. It goes over the tiles of keys that its tokens may see, first those of the ring, then those of the chunk itself,
in one loop with one online softmax (M. Milakov, N. Gimelshein, Online normalizer calculation for softmax, 2018,
arXiv 1805.02867; T. Dao, FlashAttention-2, 2023, arXiv 2307.08691). Which tiles these are follows from the start and
the window of each row, which may both be data; they may wrap around the end of the ring. A ring may have any number of
slots, see `ring_tiles`.

If there are too few blocks of queries to fill a device, programs share the tiles of a block evenly (Flash-Decoding,
T. Dao, D. Haziza, F. Massa, G. Sizov, 2023). Each returns its maximum, sum and unnormalised output; XLA combines them
and adds the sink once.

Left out: more than 64 rows per program, warp specialisation, unmasked tiles where all keys are seen, and outputs in
bfloat16 where one program has all tiles of a block.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, product, stored, swizzled
from puzzle_jax.kernels.ring_tiles import E4M3_AS_HALF, as_half, key_columns, padded, readable
from puzzle_jax.kernels.shapes import (
    Array,
    ChunkKeys,
    ChunkValues,
    Float,
    Int,
    KeyRing,
    Num,
    Queries,
    Ref,
    Rows,
    Sinks,
    Starts,
    ValueRing,
    Window,
)
from puzzle_jax.kernels.window_attention.reference import MASKED

ROWS = 64
TILE = 64
STEPS = 2
PROGRAMS = 396
"""Programs that share the tiles of few blocks of queries: three for each multiprocessor of an H100."""

TILES_PER_PART = 8
"""The fewest tiles that a program gets, if there are that many."""


def chunk_attention(
    q: Queries,
    k: ChunkKeys,
    v: ChunkValues,
    cache: LayerCache,
    sinks: Sinks,
    start: Starts,
    *,
    window: Window,
    interpret: bool = False,
) -> Queries:
    """See the api. Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, for caches other
    than bfloat16 and e4m3, for a chunk stored otherwise than its cache, and for head sizes that are not a multiple of
    64 up to 256."""
    hopper_only(interpret)
    batch, chunk, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    group, packed = heads // kv_heads, cache.k.dtype == jnp.uint8
    if not packed and cache.k.dtype != jnp.bfloat16:
        raise NotImplementedError(f"for caches of bfloat16 or e4m3, but this one is {cache.k.dtype}")
    if {k.dtype, v.dtype, cache.v.dtype} != {cache.k.dtype}:
        raise NotImplementedError(
            f"for keys and values stored as the cache is, {cache.k.dtype}, not {k.dtype}, {v.dtype}"
        )
    if dim % 64 or dim > 256:
        raise NotImplementedError(f"heads of {dim} are no multiple of 64 up to 256")
    of_bytes = E4M3_AS_HALF if packed else 1.0
    factor = dim**-0.5 * of_bytes * (1.0 if cache.k_scale is None else cache.k_scale)
    dtype = jnp.float16 if packed else cache.k.dtype
    rows = (q.astype(jnp.float32) * factor).astype(dtype).reshape(batch, chunk, kv_heads, group, dim)
    rows = rows.transpose(0, 2, 1, 3, 4).reshape(batch, kv_heads, chunk * group, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, -chunk * group % ROWS), (0, 0)))
    starts = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (batch,))
    widths = jnp.broadcast_to(jnp.asarray(slots + chunk if window is None else window, jnp.int32), (batch,))
    call = partial(_parts, slots=slots, chunk=chunk, group=group, interpret=interpret)
    out, largest, total = call(rows, *readable(cache.k, cache.v), *padded(k, v), starts, widths)
    out, largest, total = (x[:, :, :, : chunk * group] for x in (out, largest, total))

    sink = jnp.tile(sinks.astype(jnp.float32).reshape(1, kv_heads, group), (1, 1, chunk))
    top = jnp.maximum(jnp.max(largest, axis=2), sink)
    weight = jnp.exp(largest - top[:, :, None])
    whole = jnp.sum(weight * total, axis=2) + jnp.exp(sink - top)
    out = jnp.sum(weight[..., None] * out, axis=2) / whole[..., None]
    out = out * (of_bytes * (1.0 if cache.v_scale is None else cache.v_scale))
    out = out.reshape(batch, kv_heads, chunk, group, dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, chunk, heads, dim).astype(q.dtype)


def num_parts(blocks: int, tiles: int) -> int:
    """Programs that share the `tiles` tiles of one block of queries, of which there are `blocks` in total."""
    return max(1, min(-(-PROGRAMS // blocks), tiles // TILES_PER_PART))


def _cached_tiles(
    start: Array, first: Array, width: Array, slots: int
) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """For a block of queries: the tile of the oldest key in the ring that it sees, how many tiles it visits from there
    on, around the ring, and the slot of the ring's newest key. `first` is the index of its first token in the chunk."""
    oldest = jnp.maximum(jnp.maximum(start + first - width + 1, start - slots), 0)
    newest = jnp.maximum(start - 1, 0)
    from_slot, to_slot = lax.rem(oldest, slots), lax.rem(newest, slots)
    all_tiles = -(-slots // TILE)
    from_tile, to_tile = lax.div(from_slot, TILE), lax.div(to_slot, TILE)
    around = jnp.where(from_slot > to_slot, all_tiles, 0)
    count = jnp.minimum(to_tile - from_tile + around + 1, all_tiles)
    return from_tile, jnp.where(oldest < start, count, 0), to_slot


def _parts(
    rows: Float[Array, "batch kv_heads rows dim"],
    k_cache: KeyRing,
    v_cache: ValueRing,
    k_own: ChunkKeys,
    v_own: ChunkValues,
    starts: Rows,
    widths: Rows,
    *,
    slots: int,
    chunk: int,
    group: int,
    interpret: bool,
) -> tuple[
    Float[Array, "batch kv_heads parts rows dim"],
    Float[Array, "batch kv_heads parts rows"],
    Float[Array, "batch kv_heads parts rows"],
]:
    """Unnormalised output, largest logit and sum of weights of every part of what a query sees."""
    batch, kv_heads, num_rows, dim = rows.shape
    packed, dtype = k_cache.dtype == jnp.uint8, rows.dtype
    blocks, ring_tiles = num_rows // ROWS, -(-slots // TILE)
    parts = num_parts(batch * kv_heads * blocks, ring_tiles + -(-chunk // TILE))
    token_of_row = jnp.minimum(jnp.arange(num_rows, dtype=jnp.int32) // group, chunk - 1)
    mosaic = plgpu()
    matrix, vector = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(1)

    def wide(values: Array, columns: int) -> Num[Array, "rows columns"]:
        return lax.broadcast_in_dim(mosaic.layout_cast(values, vector), (ROWS, columns), (0,))

    def kernel(start_of: Ref, width_of: Ref, token_of: Ref, q: Ref, *refs: Ref) -> None:
        k_ring, v_ring, k_new, v_new, out, largest_out, total_out, *tiles = refs
        q_tile, token_tile, k_tiles, v_tiles, p_tile, out_tile, largest_tile, total_tile, own, arrived, *halves = tiles
        b, h = lax.div(lax.axis_index("head"), kv_heads), lax.rem(lax.axis_index("head"), kv_heads)
        i, s = lax.axis_index("block"), lax.axis_index("part")
        start, width, here = start_of[b], width_of[b], pl.ds(i * ROWS, ROWS)
        first = lax.div(i * ROWS, group)
        last = jnp.minimum(lax.div(i * ROWS + ROWS - 1, group), chunk - 1)
        from_tile, cached, newest = _cached_tiles(start, first, width, slots)
        own_tile = lax.div(jnp.maximum(first - width + 1, 0), TILE)
        count = cached + lax.div(last, TILE) - own_tile + 1
        begin, end = lax.div(count * s, parts), lax.div(count * (s + 1), parts)

        def place(index: Array) -> tuple[Array, Array]:
            """The tile at an index of the loop, and whether it belongs to the ring."""
            around = from_tile + index
            around = jnp.where(around >= ring_tiles, around - ring_tiles, around)
            return jnp.where(index < cached, around, own_tile + index - cached), index < cached

        def fetch(index: Array) -> None:
            (tile, of_ring), slot = place(index), lax.rem(index - begin, STEPS)
            columns = pl.ds(tile * TILE, TILE)

            def copy(k: Ref, v: Ref) -> None:
                mosaic.copy_gmem_to_smem(k.at[b, h, :, columns], k_tiles.at[slot], arrived.at[slot])
                mosaic.copy_gmem_to_smem(v.at[b, h, columns], v_tiles.at[slot], arrived.at[slot])

            pl.when(of_ring)(lambda: copy(k_ring, v_ring))
            pl.when(jnp.logical_not(of_ring))(lambda: copy(k_new, v_new))

        def step(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, vectors = carry
            (tile, of_ring), slot = place(index), lax.rem(index - begin, STEPS)
            mosaic.barrier_wait(arrived.at[slot])
            k_tile, v_tile = k_tiles.at[slot], v_tiles.at[slot]
            if packed:
                k_tile, v_tile = as_half(k_tile, halves[0]), as_half(v_tile, halves[1])
                mosaic.commit_smem()
            logits = product(q_tile, k_tile, ROWS, TILE)
            # Slots up to the newest hold positions of this lap of the ring, later slots those of the lap before.
            lap = start - 1 - newest
            number = mosaic.broadcasted_iota(jnp.int32, (ROWS, TILE), 1, layout=matrix) + tile * TILE
            there = number < jnp.where(of_ring, slots, chunk)
            near, far = jnp.where(of_ring, lap, start), jnp.where(of_ring, lap - slots, start)
            key = number + jnp.where(number <= newest, near, far)
            query = token_tile[...] + start
            oldest = jnp.maximum(query - width, -1)
            seen = there & (key <= wide(query, TILE)) & (key > wide(oldest, TILE))
            logits = jnp.where(seen, logits, MASKED)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.where(seen, jnp.exp(logits - wide(new, TILE)), 0.0)
            shrink = jnp.exp(largest - new)
            p_tile[...] = weights.astype(dtype)
            mosaic.commit_smem()
            vectors = vectors * wide(shrink, dim) + product(p_tile, v_tile, ROWS, dim)
            pl.when(index + STEPS < end)(lambda: fetch(index + STEPS))
            return new, total * shrink + jnp.sum(weights, axis=1), vectors

        for ahead in range(STEPS):
            pl.when(begin + ahead < end)(partial(fetch, begin + ahead))
        for source, target in ((q.at[b, h, here], q_tile), (token_of.at[here], token_tile)):
            mosaic.copy_gmem_to_smem(source, target, own)
            mosaic.barrier_wait(own)
        carry = (
            mosaic.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), vector),
            mosaic.layout_cast(jnp.zeros((ROWS,), jnp.float32), vector),
            mosaic.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), matrix),
        )
        largest_tile[...], total_tile[...], out_tile[...] = lax.fori_loop(begin, end, step, carry)
        at = b, h, s, here
        stored((out_tile, out.at[at]), (largest_tile, largest_out.at[at]), (total_tile, total_out.at[at]))

    def shared(shape: tuple[int, ...], kind: object = dtype, columns: int | None = None) -> object:
        """A tile of shared memory, with a swizzle of so many columns, or of all columns of the tile."""
        bits = 8 if kind == jnp.uint8 else 16
        return mosaic.SMEM(shape, kind, transforms=swizzled(columns or shape[-1], bits))

    # Both operands of a product must have swizzles of one width.
    columns = key_columns(k_cache.shape[3], TILE)
    halves = [shared((dim, TILE)), shared((TILE, dim))] if packed else []
    cached = k_cache.dtype
    scratch = [
        shared((ROWS, dim), columns=None if packed else min(columns, dim)),
        mosaic.SMEM((ROWS,), jnp.int32),
        shared((STEPS, dim, TILE), cached, columns),
        shared((STEPS, TILE, dim), cached),
        shared((ROWS, TILE)),
        mosaic.SMEM((ROWS, dim), jnp.float32),
        mosaic.SMEM((ROWS,), jnp.float32),
        mosaic.SMEM((ROWS,), jnp.float32),
        mosaic.Barrier(),
        mosaic.Barrier(num_arrivals=2, num_barriers=STEPS),
        *halves,
    ]
    shape = batch, kv_heads, parts, num_rows
    per_row = jax.ShapeDtypeStruct(shape, jnp.float32)
    outputs = [jax.ShapeDtypeStruct((*shape, dim), jnp.float32), per_row, per_row]
    grid = {"head": batch * kv_heads, "block": blocks, "part": parts}
    call = launched(kernel, outputs, grid, scratch, interpret)
    out, largest, total = call(starts, widths, token_of_row, rows, k_cache, v_cache, k_own, v_own)
    return out, largest, total
