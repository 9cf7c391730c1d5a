"""The window attention kernels for GPUs and TPUs, interpreted, against the reference: values and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.sinks import given_or_weightless
from puzzle_jax.kernels.window_attention import mosaic_gpu, mosaic_wide, splash, window_attention
from tests.kernels.marks import GPU
from tests.support import normal

KERNELS = [pytest.param(mosaic_gpu, marks=GPU, id="mosaic_gpu"), pytest.param(splash, id="splash")]
BATCH, SEQ, KV_HEADS, GROUP, DIM = 1, 150, 2, 3, 64  # the last of three tiles is short


def made_up(seq=SEQ, batch=BATCH):
    shapes = (batch, seq, KV_HEADS * GROUP, DIM), *[(batch, seq, KV_HEADS, DIM)] * 2
    (q, k, v), (sinks,) = normal(0, *shapes, dtype=jnp.bfloat16), normal(1, (KV_HEADS * GROUP,))
    return (q, k, v), sinks


def exact(q, k, v):
    q, k, v = (jnp.asarray(np.asarray(x, np.float32)) for x in (q, k, v))
    return q, k, v


def once(run, *given, **options):
    """The result of `run`, jitted: one program compiles faster than the operations one by one."""
    return jax.jit(lambda *given: run(*given, **options))(*given)


SEGMENTS = jnp.asarray([[0] * 70 + [1] * 13 + [2] * 67])
CASES = {
    "full": (None, None),
    "shorter than a tile": (7, None),
    "one more than a tile": (65, None),
    "longer than the sequence": (151, None),
    "packed sequences": (90, SEGMENTS),
    "segments in no order": (None, jnp.asarray([[2] * 66 + [0] * 10 + [1] * 30 + [2] * 44])),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_values(kernel, case):
    window, segments = CASES[case]
    arrays, sinks = made_up()
    options = {"window": window, "segment_ids": segments}
    found = once(kernel.window_attention, *arrays, sinks, **options, interpret=True)
    expected = once(window_attention, *exact(*arrays), sinks, **options, implementation="reference")
    assert found.dtype == jnp.bfloat16 and found.shape == (BATCH, SEQ, KV_HEADS * GROUP, DIM)
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["full", "packed sequences"])
def test_gradients(kernel, case):
    window, segments = CASES[case]
    arrays, sinks = made_up()
    (cotangent,) = normal(9, (BATCH, SEQ, KV_HEADS * GROUP, DIM))

    def loss(run, *given):
        return jnp.sum(run(*given, window=window, segment_ids=segments).astype(jnp.float32) * cotangent)

    def interpreted(*given, **options):
        return kernel.window_attention(*given, **options, interpret=True)

    def reference(*given, **options):
        return window_attention(*given, **options, implementation="reference")

    found = once(jax.grad(lambda *given: loss(interpreted, *given), (0, 1, 2, 3)), *arrays, sinks)
    expected = once(jax.grad(lambda *given: loss(reference, *given), (0, 1, 2, 3)), *exact(*arrays), sinks)
    for one, other in zip(found, map(np.asarray, expected), strict=True):
        largest = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float32) / largest, other / largest, atol=1e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sinks_that_weigh_nothing(kernel):
    (q, k, v), _ = made_up()
    none = given_or_weightless(None, KV_HEADS * GROUP)
    (cotangent,) = normal(9, q.shape)

    def both(run):
        def f(q, k, v):
            out = run(q, k, v)
            return jnp.sum(out.astype(jnp.float32) * cotangent), out

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)

    def interpreted(q, k, v):
        return kernel.window_attention(q, k, v, none, window=65, segment_ids=SEGMENTS, interpret=True)

    def reference(q, k, v):
        return window_attention(q, k, v, None, window=65, segment_ids=SEGMENTS, implementation="reference")

    (_, out), found = once(both(interpreted), q, k, v)
    (_, expected_out), expected = once(both(reference), *exact(q, k, v))
    np.testing.assert_allclose(np.asarray(out, np.float32), expected_out, atol=2e-2)
    for one, other in zip(found, map(np.asarray, expected), strict=True):
        largest = np.abs(other).max()
        np.testing.assert_allclose(np.asarray(one, np.float32) / largest, other / largest, atol=1e-2)


@GPU
def test_windows_that_are_data():
    arrays, sinks = made_up(batch=3)
    for window in (jnp.asarray([7, 65, 150]), jnp.asarray([80])):
        found = once(mosaic_gpu.window_attention, *arrays, sinks, window=window, interpret=True)
        expected = once(window_attention, *exact(*arrays), sinks, window=window, implementation="reference")
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


WIDE = {
    "full": (None, None),
    "a window": (70, None),
    "packed sequences": (None, jnp.asarray([[0] * 70 + [1] * 13 + [2] * 217])),
}


@GPU
@pytest.mark.parametrize("case", WIDE)
def test_128_queries_to_a_program(monkeypatch, case):
    monkeypatch.setattr(mosaic_wide, "MIN_REACH", 70)
    window, segments = WIDE[case]
    arrays, sinks = made_up(seq=300)  # the last of three blocks is short
    options = {"window": window, "segment_ids": segments}
    found = once(mosaic_gpu.wide_attention, *arrays, sinks, **options, interpret=True)
    expected = once(window_attention, *exact(*arrays), sinks, **options, implementation="reference")
    assert found.dtype == jnp.bfloat16 and found.shape == arrays[0].shape
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=2e-2)


@GPU
def test_gradients_take_the_same_from_either_forward_pass():
    (q, k, v), sinks = made_up(seq=256)
    segments, widths = jnp.zeros((1, 256), jnp.int32), jnp.asarray([256])
    found = []
    for wide in (True, False):
        shape = mosaic_gpu.Shape(1, 256, KV_HEADS * GROUP, KV_HEADS, DIM, False, False, True, wide)
        seen = mosaic_gpu._seen(shape, segments, widths)
        found.append([np.asarray(x, np.float32) for x in mosaic_gpu._forward(shape, q, k, v, sinks, seen)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-2)


@GPU
def test_short_reaches_are_left_to_64_queries():
    arrays, sinks = made_up(seq=600)
    for window in (500, jnp.asarray([600])):
        with pytest.raises(NotImplementedError, match="for all keys or windows of 1024 or more"):
            mosaic_gpu.wide_attention(*arrays, sinks, window=window, interpret=True)
    with pytest.raises(NotImplementedError, match="for more than 512 tokens, but these are 150"):
        mosaic_gpu.wide_attention(*made_up()[0], sinks, window=None, interpret=True)


@pytest.mark.parametrize("ordered", [True, False])
def test_tiles_that_are_left_out_hold_nothing_that_is_seen(ordered):
    """Checked by brute force over all pairs of tokens."""
    source, tile = np.random.default_rng(0), mosaic_gpu.TILE
    batch, tiles = 3, 6
    segments = source.integers(0, 9, (batch, tiles * tile // 16)).repeat(16, axis=1)
    segments = np.sort(segments, axis=1) if ordered else segments
    widths = np.asarray([1, 70, tiles * tile])
    shape = mosaic_gpu.Shape(batch, tiles * tile, 2, 1, 64, True, True, False, False)
    first, last = once(shape.bounds, jnp.asarray(segments), jnp.asarray(widths))
    query, key = (np.arange(tiles * tile).reshape(shape) for shape in ((-1, 1), (1, -1)))
    seen = (key <= query) & (key > query - widths[:, None, None]) & (segments[:, :, None] == segments[:, None])
    by_tile = seen.reshape(batch, tiles, tile, tiles, tile).any(axis=(2, 4))
    kept = np.arange(tiles)
    between = (kept[None, None] >= np.asarray(first)[:, :, None]) & (kept[None, None] <= kept[None, :, None])
    assert not (by_tile & ~between).any()
    between = (kept[None, :, None] <= np.asarray(last)[:, None]) & (kept[None, :, None] >= kept[None, None])
    assert not (by_tile & ~between).any()
    if ordered:  # and the first tile kept is the first that is seen
        np.testing.assert_array_equal(first, by_tile.argmax(axis=2))


@GPU
def test_what_the_gpu_kernel_is_not_made_for_is_refused():
    (q, k, v), sinks = made_up()
    with pytest.raises(NotImplementedError, match="for bfloat16, but this is float32"):
        mosaic_gpu.window_attention(*exact(q, k, v), sinks, window=3, interpret=True)
    with pytest.raises(NotImplementedError, match="heads of 48 are no multiple of 64"):
        mosaic_gpu.window_attention(q[..., :48], k[..., :48], v[..., :48], sinks, window=3, interpret=True)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0, but this is cpu"):
        window_attention(q, k, v, sinks, window=3, implementation="mosaic_gpu")


def test_what_splash_attention_is_not_made_for_is_refused():
    (q, k, v), sinks = made_up()
    with pytest.raises(NotImplementedError, match="the window is not a static number"):
        splash.window_attention(q, k, v, sinks, window=jnp.asarray([3]), interpret=True)
    with pytest.raises(NotImplementedError, match="for TPUs, but this is cpu"):
        window_attention(q, k, v, sinks, window=3, implementation="splash")
