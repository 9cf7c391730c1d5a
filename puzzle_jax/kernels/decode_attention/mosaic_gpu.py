"""`decode_attention` on Hopper GPUs, in Pallas' Mosaic GPU: a program per row, key-value head and part of the cache.

The query heads that share a key-value head are the rows of one wgmma, which needs 64 of them: the rest are zeros. Keys
and values arrive by TMA in a ring of tiles, bytes of e4m3 become float16 on their way through registers (two integer
operations; the factor of 256 by which their exponents differ is folded into logits and output), and the softmax runs
online over the tiles of a part. Every part returns its maximum, sum and unnormalised output; XLA combines them and adds
the sink once.

Parts without visible slots are skipped, so time grows with what is cached, not with the cache's size. A cache may have
any number of slots, see `ring_tiles`; the last tiles may reach past the end.

Left out: several query tokens, and a number of parts chosen by how many programs the device runs at a time.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.decode_attention.reference import LayerCache, seen_slots
from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, product, stored, swizzled
from puzzle_jax.kernels.ring_tiles import E4M3_AS_HALF, as_half, key_columns, readable
from puzzle_jax.kernels.shapes import Array, Float, Heads, Index, KeyRing, Ref, Rows, Sinks, ValueRing, Window
from puzzle_jax.kernels.window_attention.reference import MASKED

ROWS = 64
LARGEST_TILE, SMALLEST_TILE = 128, 64
TILES_PER_PART = 8
STEPS = 2


def decode_attention(
    q: Heads, cache: LayerCache, sinks: Sinks, positions: Rows, *, window: Window, interpret: bool = False
) -> Heads:
    """See the api. Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, for caches other
    than bfloat16 and e4m3, for head sizes that are not a multiple of 64 up to 256, and for more than 64 query heads per
    key-value head."""
    hopper_only(interpret)
    batch, heads, dim = q.shape
    kv_heads, slots = cache.k.shape[1], cache.slots
    group, packed = heads // kv_heads, cache.k.dtype == jnp.uint8
    if not packed and cache.k.dtype != jnp.bfloat16:
        raise NotImplementedError(f"for caches of bfloat16 or e4m3, but this one is {cache.k.dtype}")
    if dim % 64 or dim > 256 or group > ROWS:
        raise NotImplementedError(f"heads of {dim} are no multiple of 64 up to 256, or {group} share one key")
    tile, tiles, parts = tiling(slots)
    of_bytes = E4M3_AS_HALF if packed else 1.0
    factor = dim**-0.5 * of_bytes * (1.0 if cache.k_scale is None else cache.k_scale)
    dtype = jnp.float16 if packed else cache.k.dtype
    rows = (q.astype(jnp.float32) * factor).astype(dtype).reshape(batch, kv_heads, group, dim)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, ROWS - group), (0, 0)))
    widths = jnp.broadcast_to(jnp.asarray(slots if window is None else window, jnp.int32), (batch,))
    call = partial(_parts, slots=slots, group=group, interpret=interpret)
    out, largest, total = call(rows, *readable(cache.k, cache.v), positions, widths)
    out, largest, total = out[..., :group, :], largest[..., :group], total[..., :group]

    # The results of skipped parts are undefined.
    first = jnp.arange(parts) * tile * tiles
    start, stop = seen_slots(positions[:, None], widths[:, None], slots)
    there = ((first <= stop) & (first + tile * tiles > start))[:, None, :, None]
    largest = jnp.where(there, largest, MASKED)
    sink = sinks.astype(jnp.float32).reshape(1, kv_heads, group)
    top = jnp.maximum(jnp.max(largest, axis=2), sink)
    weight = jnp.exp(largest - top[:, :, None])
    whole = jnp.sum(jnp.where(there, weight * total, 0.0), axis=2) + jnp.exp(sink - top)
    out = jnp.sum(jnp.where(there[..., None], weight[..., None] * out, 0.0), axis=2) / whole[..., None]
    out = out * (of_bytes * (1.0 if cache.v_scale is None else cache.v_scale))
    return out.reshape(batch, heads, dim).astype(q.dtype)


def tiling(slots: int) -> tuple[int, int, int]:
    """Slots per tile, tiles per part, and number of parts."""
    tile = LARGEST_TILE if slots > SMALLEST_TILE else SMALLEST_TILE
    count = -(-slots // tile)
    parts = -(-count // TILES_PER_PART)
    return tile, -(-count // parts), parts


def _parts(
    rows: Float[Array, "batch kv_heads rows dim"],
    k_cache: KeyRing,
    v_cache: ValueRing,
    positions: Rows,
    widths: Rows,
    *,
    slots: int,
    group: int,
    interpret: bool,
) -> tuple[
    Float[Array, "batch kv_heads parts some dim"],
    Float[Array, "batch kv_heads parts rows"],
    Float[Array, "batch kv_heads parts rows"],
]:
    """Unnormalised output, largest logit and sum of weights of every part of the cache."""
    batch, kv_heads, _, dim = rows.shape
    packed, (tile, tiles, parts) = k_cache.dtype == jnp.uint8, tiling(slots)
    columns = key_columns(k_cache.shape[3], tile)
    part, some, dtype = tile * tiles, -(-group // 8) * 8, rows.dtype
    mosaic = plgpu()
    matrix, vector = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(1)

    def kernel(position_of: Ref, width_of: Ref, q: Ref, k: Ref, v: Ref, *refs: Ref) -> None:
        out, largest_out, total_out, q_tile, p_tile, out_tile, largest_tile, total_tile, arrived, *halves = refs
        b, h, s = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("part")
        position, width = position_of[b], width_of[b]

        def wide(values: Float[Array, "rows"], columns: int) -> Float[Array, "rows columns"]:
            return lax.broadcast_in_dim(values, (ROWS, columns), (0,))

        def step(index: tuple[Index], k_tile: Ref, v_tile: Ref, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            largest, total, out = carry
            if packed:
                k_tile, v_tile = as_half(k_tile, halves[0]), as_half(v_tile, halves[1])
                mosaic.commit_smem()
            logits = product(q_tile, k_tile, ROWS, tile)
            slot = mosaic.broadcasted_iota(jnp.int32, (ROWS, tile), 1, layout=matrix) + (s * part + index[0] * tile)
            # A slot holds the last position with its number; the distance to the query decides whether it is seen.
            behind = lax.rem(position, slots) - slot
            behind = jnp.where(behind < 0, behind + slots, behind)
            seen = (behind <= position) & (behind < width)
            if slots % part:
                seen = seen & (slot < slots)
            logits = jnp.where(seen, logits, MASKED)
            new = jnp.maximum(largest, jnp.max(logits, axis=1))
            weights = jnp.where(seen, jnp.exp(logits - wide(new, tile)), 0.0)
            shrink = jnp.exp(largest - new)
            p_tile[...] = weights.astype(dtype)
            mosaic.commit_smem()
            out = out * wide(shrink, dim) + product(p_tile, v_tile, ROWS, dim)
            return new, total * shrink + jnp.sum(weights, axis=1), out

        start, stop = seen_slots(position, width, slots)

        @pl.when((s * part <= stop) & ((s + 1) * part > start))
        def _() -> None:
            mosaic.copy_gmem_to_smem(q.at[b, h], q_tile, arrived)
            mosaic.barrier_wait(arrived)
            bits = 8 if packed else 16
            pipeline = mosaic.emit_pipeline(
                step,
                grid=(tiles,),
                in_specs=[
                    mosaic.BlockSpec((dim, tile), lambda i: (0, s * tiles + i), transforms=swizzled(columns, bits)),
                    mosaic.BlockSpec((tile, dim), lambda i: (s * tiles + i, 0), transforms=swizzled(dim, bits)),
                ],
                max_concurrent_steps=min(STEPS, tiles),
                init_carry=(
                    mosaic.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), vector),
                    mosaic.layout_cast(jnp.zeros((ROWS,), jnp.float32), vector),
                    mosaic.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), matrix),
                ),
            )
            largest_tile[...], total_tile[...], out_tile[...] = pipeline(k.at[b, h], v.at[b, h])
            results = (out_tile.at[pl.ds(0, some)], out), (largest_tile, largest_out), (total_tile, total_out)
            stored(*((tile, target.at[b, h, s]) for tile, target in results))

    def shared(shape: tuple[int, ...], swizzle: bool = True) -> object:
        kind = dtype if swizzle else jnp.float32
        return mosaic.SMEM(shape, kind, transforms=swizzled(shape[1]) if swizzle else ())

    # Both operands of a product must have swizzles of one width.
    q_tile = mosaic.SMEM((ROWS, dim), dtype, transforms=swizzled(dim if packed else min(columns, dim)))
    grid = (batch, kv_heads, parts)
    per_row = jax.ShapeDtypeStruct((*grid, ROWS), jnp.float32)
    halves = [shared((dim, tile)), shared((tile, dim))] if packed else []
    vectors = [shared((ROWS, dim), False), shared((ROWS,), False), shared((ROWS,), False)]
    outputs = [jax.ShapeDtypeStruct((*grid, some, dim), jnp.float32), per_row, per_row]
    scratch = [q_tile, shared((ROWS, tile)), *vectors, mosaic.Barrier(), *halves]
    call = launched(kernel, outputs, dict(zip(("row", "head", "part"), grid, strict=True)), scratch, interpret)
    out, largest, total = call(positions, widths, rows, k_cache, v_cache)
    return out, largest, total
