"""The Hopper kernel for chunks of tokens against a cache, interpreted, against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.chunk_attention import chunk_attention, mosaic_gpu
from puzzle_jax.kernels.decode_attention.reference import LayerCache, slot_positions
from puzzle_jax.kernels.float8 import encode_e4m3
from puzzle_jax.kernels.sinks import given_or_weightless
from tests.kernels.marks import GPU

GROUP, DIM = 5, 64  # the 64 rows of a program hold 12 tokens and part of another


def made_up(slots, chunk, packed, batch=1, kv_heads=1):
    keys = jax.random.split(jax.random.key(0), 6)
    q = jax.random.normal(keys[0], (batch, chunk, kv_heads * GROUP, DIM)).astype(jnp.bfloat16)
    shapes = ((DIM, chunk), (chunk, DIM), (DIM, slots), (slots, DIM))
    held = [jax.random.normal(key, (batch, kv_heads, *shape)) for key, shape in zip(keys[1:5], shapes, strict=True)]
    sinks = jax.random.normal(keys[5], (kv_heads * GROUP,))
    if not packed:
        return (q, *(x.astype(jnp.bfloat16) for x in held), sinks), {}
    scales = {"k_scale": jnp.float32(0.015), "v_scale": jnp.float32(0.02)}
    by = (scales["k_scale"], scales["v_scale"]) * 2
    return (q, *(encode_e4m3(x, scale) for x, scale in zip(held, by, strict=True)), sinks), scales


def agrees(given, scales, start, window, atol=1e-2):
    """Asserts that the kernel agrees with the reference; returns its output."""
    q, k, v, k_cache, v_cache, sinks = given
    window = jnp.asarray(window) if isinstance(window, list) else window
    cache, start = LayerCache(k_cache, v_cache, **scales), jnp.asarray(start, jnp.int32)
    found = mosaic_gpu.chunk_attention(q, k, v, cache, sinks, start, window=window, interpret=True)
    assert found.dtype == jnp.bfloat16 and found.shape == q.shape
    exact = tuple(x if x.dtype == jnp.uint8 else x.astype(jnp.float32) for x in given)
    options = {"start": start, "window": window, **scales}
    expected = chunk_attention(*exact, **options, implementation="reference")
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=atol)
    return found


CASES = {  # slots, tokens, start, window
    "first chunk, nothing cached": (192, 20, 0, None),
    "partly filled, last tile short": (160, 20, 100, None),
    "full": (128, 3, 128, None),
    "parts of a long cache": (2048, 3, 1900, None),
    "more parts than tiles": (2048, 3, 7, None),
    "parts that no window reaches": (2048, 3, 1900, 130),
    "a ring that came round": (128, 20, 1000, 128),
    "a ring, at its seam": (192, 20, 3 * 192, 192),
    "a window within a larger ring, across its seam": (192, 14, 2 * 192 + 30, 70),
    "a window that ends with the chunk": (128, 20, 500, 9),
    "one slot": (1, 14, 77, 1),
    "slots that are copied, and came round": (37, 20, 300, 37),
    "a chunk longer than its ring": (64, 70, 200, 64),
}


OF_BYTES = ["partly filled, last tile short", "parts of a long cache", "a ring that came round", "one slot"]
OF_BYTES += ["slots that are copied, and came round", "first chunk, nothing cached"]


@GPU
@pytest.mark.parametrize("case,packed", [*((case, False) for case in CASES), *((case, True) for case in OF_BYTES)])
def test_as_the_reference(case, packed):
    slots, chunk, start, window = CASES[case]
    agrees(*made_up(slots, chunk, packed), start, window)


@GPU
def test_rows_of_their_own_starts_and_windows():
    given, scales = made_up(96, 7, False, batch=3, kv_heads=2)
    agrees(given, scales, [0, 50, 400], [96, 7, 60])


@GPU
@pytest.mark.parametrize("case", ["first chunk, nothing cached", "parts that no window reaches"])
def test_sinks_that_weigh_nothing(case):
    slots, chunk, start, window = CASES[case]
    (q, k, v, k_cache, v_cache, _), _ = made_up(slots, chunk, False)
    found = agrees((q, k, v, k_cache, v_cache, given_or_weightless(None, GROUP)), {}, start, window)
    q, k, v, k_cache, v_cache = (x.astype(jnp.float32) for x in (q, k, v, k_cache, v_cache))
    options = {"window": window, "implementation": "reference"}
    expected = chunk_attention(q, k, v, k_cache, v_cache, None, jnp.int32(start), **options)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-2)


@GPU
def test_slots_that_hold_nothing_are_not_seen():
    (q, k, v, k_cache, v_cache, sinks), _ = made_up(160, 14, False)
    poisoned = k_cache.at[..., 40:].set(1e4)
    clean, found = (agrees((q, k, v, held, v_cache, sinks), {}, 40, None) for held in (k_cache, poisoned))
    np.testing.assert_array_equal(found, clean)


def test_tiles_are_those_that_hold_what_is_seen():
    """Brute force over starts, windows and rings: no needed tile is left out, none is visited twice or needlessly."""
    tile = mosaic_gpu.TILE
    for slots in (1, 64, 100, 192, 1000):
        tiles = -(-slots // tile)
        for start in (0, 1, 63, slots - 1, slots, slots + 30, 5 * slots + 129):
            held = np.asarray(slot_positions(jnp.asarray(start - 1), slots))
            for first in (0, 40):
                for width in (1, 70, slots, slots + 500):
                    seen = (held >= 0) & (held > start + first - width)
                    needed = np.unique(np.flatnonzero(seen) // tile)
                    given = jnp.int32(start), jnp.int32(first), jnp.int32(width), slots
                    begin, count, newest = map(int, mosaic_gpu._cached_tiles(*given))
                    visited = (begin + np.arange(count)) % tiles
                    assert len(set(visited)) == count and set(needed) == set(visited), (slots, start, first, width)
                    assert newest == max(start - 1, 0) % slots


def test_tiles_are_shared_where_there_are_few_blocks():
    assert mosaic_gpu.num_parts(blocks=8, tiles=1032) == 50  # one row of few tokens, a long cache
    assert mosaic_gpu.num_parts(blocks=512, tiles=1032) == 1
    assert mosaic_gpu.num_parts(blocks=8, tiles=3) == 1


@GPU
def test_what_it_is_not_made_for_is_refused():
    (q, k, v, k_cache, v_cache, sinks), _ = made_up(96, 3, False)

    def attend(q=q, k=k, v=v, cache=None):
        cache = cache or LayerCache(k_cache, v_cache)
        return mosaic_gpu.chunk_attention(q, k, v, cache, sinks, jnp.int32(5), window=None, interpret=True)

    with pytest.raises(NotImplementedError, match="heads of 32 are no multiple of 64"):
        attend(q[..., :32], k[:, :, :32], v[..., :32], LayerCache(k_cache[:, :, :32], v_cache[..., :32]))
    with pytest.raises(NotImplementedError, match="for caches of bfloat16 or e4m3, but this one is float32"):
        attend(cache=LayerCache(k_cache.astype(jnp.float32), v_cache.astype(jnp.float32)))
    with pytest.raises(NotImplementedError, match="stored as the cache is, bfloat16, not float32, bfloat16"):
        attend(k=k.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, but this is cpu"):
        chunk_attention(q, k, v, k_cache, v_cache, sinks, jnp.int32(5), window=None, implementation="mosaic_gpu")
