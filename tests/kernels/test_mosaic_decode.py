"""The decode kernels for Hopper GPUs and for TPUs, interpreted, against the reference."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.kernels.decode_attention import decode_attention, mosaic_gpu, mosaic_tpu
from puzzle_jax.kernels.decode_attention.reference import LayerCache
from puzzle_jax.kernels.float8 import e4m3_values, encode_e4m3
from puzzle_jax.kernels.sinks import given_or_weightless
from tests.kernels.marks import GPU
from tests.support import normal

BATCH, KV_HEADS, GROUP, DIM = 2, 3, 5, 64


# Jitted: one program compiles faster than the operations one by one.
encode = jax.jit(encode_e4m3)
reference = jax.jit(partial(decode_attention, implementation="reference"), static_argnames="window")
reference_by_row = jax.jit(partial(decode_attention, implementation="reference"))


def made_up(slots, packed, kv_heads=KV_HEADS, dtype=jnp.bfloat16):
    shapes = (BATCH, kv_heads * GROUP, DIM), (BATCH, kv_heads, DIM, slots), (BATCH, kv_heads, slots, DIM)
    q, k, v = normal(0, *shapes, dtype=dtype)
    (sinks,) = normal(1, (kv_heads * GROUP,))
    if not packed:
        return (q, k, v, sinks), {}
    scales = {"k_scale": jnp.float32(0.015), "v_scale": jnp.float32(0.02)}
    return (q, encode(k, scales["k_scale"]), encode(v, scales["v_scale"]), sinks), scales


def interpreted(kernel, q, k, v, sinks, positions, *, window, scales):
    def run(q, k, v, sinks, positions, scales):
        cache = LayerCache(k, v, **scales)
        return kernel.decode_attention(q, cache, sinks, positions, window=window, interpret=True)

    return jax.jit(run)(q, k, v, sinks, jnp.asarray(positions), scales)


CASES = {
    "one tile": (64, None, [0, 63]),
    "parts that hold nothing yet": (2048, None, [3, 1300]),
    "a ring that has wrapped": (128, 128, [1000, 127]),
    "a window within a larger cache": (384, 100, [40, 383]),
    "a window per row": (192, [7, 150], [191, 500]),
    "parts that no window reaches": (2048, 70, [1500, 2047]),
    "one slot": (1, 1, [0, 9]),
    "slots that are copied on GPUs": (37, 37, [20, 100]),
    "the last tile past the slots": (96, 50, [95, 400]),
}
GPU_CASES = {  # for the GPU kernel alone, which cuts these slots into parts
    "a part past the slots": (1168, None, [1100, 1167]),
    "a ring in parts that came round": (1168, 1168, [1168, 3000]),
}


@pytest.mark.parametrize(
    "kernel,case",
    [
        *((mosaic_tpu, case) for case in CASES),
        *(pytest.param(mosaic_gpu, case, marks=GPU) for case in (*CASES, *GPU_CASES)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_as_the_reference(kernel, case, packed):
    slots, window, positions = {**CASES, **GPU_CASES}[case]
    by_row = isinstance(window, list)
    window = jnp.asarray(window) if by_row else window
    (q, k, v, sinks), scales = made_up(slots, packed, kv_heads=1 if slots > 1000 else KV_HEADS)
    found = interpreted(kernel, q, k, v, sinks, positions, window=window, scales=scales)
    q, k, v = (x if x.dtype == jnp.uint8 else jnp.asarray(np.asarray(x, np.float32)) for x in (q, k, v))
    exact = reference_by_row if by_row else reference
    expected = exact(q, k, v, sinks, jnp.asarray(positions), window=window, **scales)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-2)


@pytest.mark.parametrize("kernel", [mosaic_tpu, pytest.param(mosaic_gpu, marks=GPU)])
@pytest.mark.parametrize("case", ["parts that hold nothing yet", "parts that no window reaches"])
def test_sinks_that_weigh_nothing(kernel, case):
    slots, window, positions = CASES[case]
    (q, k, v, _), _ = made_up(slots, False, kv_heads=1)
    none = given_or_weightless(None, GROUP)
    found = interpreted(kernel, q, k, v, none, positions, window=window, scales={})
    q, k, v = (jnp.asarray(np.asarray(x, np.float32)) for x in (q, k, v))
    expected = reference(q, k, v, None, jnp.asarray(positions), window=window)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=1e-2)


@pytest.mark.parametrize("slots", [96, 640])
def test_float32_on_tpus(slots):
    """All slots in one tile, and tiles of 128, several of which lie beyond what is cached."""
    given, _ = made_up(slots, False, dtype=jnp.float32)
    positions = jnp.asarray([slots + 3, 50])
    found = interpreted(mosaic_tpu, *given, positions, window=64, scales={})
    expected = reference(*given, positions, window=64)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_byte_is_the_number_that_it_stands_for():
    codes = jnp.arange(256, dtype=jnp.int32)
    finite = np.asarray(codes & 0x7F) != 0x7F  # the two NaN bytes are never written
    expected = np.asarray(codes.astype(jnp.uint8)).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(e4m3_values(codes))[finite], expected[finite])


def test_slots_that_no_tile_of_a_tpu_fits_are_refused():
    slots = 4096 + 64
    q, cache = jnp.zeros((1, 2, 64)), jnp.zeros((1, 1, 64, slots))
    with pytest.raises(NotImplementedError, match="4160 slots are no multiple of 128, and too many for one tile"):
        mosaic_tpu.decode_attention(
            q, LayerCache(cache, cache.swapaxes(2, 3)), jnp.zeros(2), jnp.zeros(1, int), window=None, interpret=True
        )


def test_parts_hold_all_slots_and_few_tiles_beyond():
    assert mosaic_gpu.tiling(65_536) == (128, 8, 64)
    assert mosaic_gpu.tiling(128) == (128, 1, 1) and mosaic_gpu.tiling(1) == (64, 1, 1)
    for slots in (65, 1025, 9 * 128 + 16, 131 * 128, 70_000):
        tile, tiles, parts = mosaic_gpu.tiling(slots)
        assert tile * tiles * parts >= slots > tile * tiles * (parts - 1)
        assert tiles <= mosaic_gpu.TILES_PER_PART and tiles * parts - -(-slots // tile) < parts


@GPU
def test_what_it_is_not_made_for_is_refused():
    (q, k, v, sinks), _ = made_up(96, False)
    positions = jnp.asarray([3, 4])
    with pytest.raises(NotImplementedError, match="heads of 32 are no multiple of 64"):
        mosaic_gpu.decode_attention(
            q[..., :32], LayerCache(k[:, :, :32], v[..., :32]), sinks, positions, window=None, interpret=True
        )
    with pytest.raises(NotImplementedError, match="for caches of bfloat16 or e4m3, but this one is float32"):
        mosaic_gpu.decode_attention(
            q, LayerCache(k.astype(jnp.float32), v.astype(jnp.float32)), sinks, positions, window=None, interpret=True
        )
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, but this is cpu"):
        decode_attention(q, k, v, sinks, positions, window=None, implementation="mosaic_gpu")
