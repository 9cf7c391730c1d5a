import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.config import cache_slots
from puzzle_jax.kernels.chunk_attention import chunk_attention
from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.dispatch import recording
from puzzle_jax.kernels.float8 import decode_e4m3, encode_e4m3
from puzzle_jax.kernels.window_attention import online_blocks, reference, window_attention
from tests.support import normal

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 10


def arrays(seq, seed=0, dtype=jnp.float32):
    shapes = (BATCH, seq, HEADS, DIM), *[(BATCH, seq, KV_HEADS, DIM)] * 2, (HEADS,)
    q, k, v, sinks = normal(seed, *shapes, dtype=dtype)
    return q, k, v, sinks


# One jitted program each, which compiles faster than the operations one by one.
decode = jax.jit(decode_attention, static_argnames="window")
chunked = jax.jit(chunk_attention, static_argnames=("window", "implementation"))
chunked_by_row = jax.jit(chunk_attention, static_argnames="implementation")


def attend(*arrays, window, segment_ids=None, by=window_attention, **options):
    """`window_attention`, or another function of the same arguments, jitted as one program."""
    as_data = isinstance(window, jax.Array)

    def run(arrays, segment_ids, given):
        return by(*arrays, window=given if as_data else window, segment_ids=segment_ids, **options)

    return jax.jit(run)(arrays, segment_ids, window if as_data else None)


def by_hand(q, k, v, sinks, window, segments=None) -> np.ndarray:
    """Attention in float64, one query at a time, with each window as a list of visible positions."""
    q, k, v, sinks = (np.asarray(x, np.float64) for x in (q, k, v, sinks))
    out = np.zeros_like(q)
    for b in range(q.shape[0]):
        width = window if window is None or isinstance(window, int) else int(window[b])
        for i in range(q.shape[1]):
            seen = [j for j in range(i + 1) if width is None or j > i - width]
            if segments is not None:
                seen = [j for j in seen if segments[b, j] == segments[b, i]]
            for h in range(HEADS):
                group = h // (HEADS // KV_HEADS)
                weights = np.exp(k[b, seen, group] @ q[b, i, h] / np.sqrt(DIM))
                out[b, i, h] = weights @ v[b, seen, group] / (weights.sum() + np.exp(sinks[h]))
    return out


SEGMENTS = np.asarray([[0] * 17 + [1] * 20 + [2] * 4, [0] * 2 + [1] * 39])


@pytest.mark.parametrize("implementation", ["reference", "square"])
@pytest.mark.parametrize("window", [None, 1, 5, 16, 200])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_attention_by_hand(implementation, window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = attend(*data, window=window, segment_ids=ids, implementation=implementation)
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


@pytest.mark.parametrize(
    "implementation,window", [("reference", 5), ("square", None), ("causal_blocks", 33), ("banded", 5)]
)
def test_attention_without_sinks_is_a_plain_softmax(implementation, window):
    q, k, v, _ = arrays(41)
    nothing = np.full(HEADS, -np.inf)

    def run(q, k, v):
        return jnp.sum(jnp.sin(attend(q, k, v, None, window=window, implementation=implementation)))

    def plain(q, k, v):
        logits = jnp.einsum("bihd,bjhd->bhij", q, jnp.repeat(k, 2, axis=2)) / np.sqrt(DIM)
        i, j = np.indices((41, 41))
        seen = (j <= i) & (j > i - (window or 41))
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("bhij,bjhd->bihd", weights, jnp.repeat(v, 2, axis=2))))

    out = attend(q, k, v, None, window=window, implementation=implementation)
    np.testing.assert_allclose(out, by_hand(q, k, v, nothing, window), atol=2e-6)
    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(q, k, v) for f in (run, plain))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=3e-6)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 20])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_a_band_of_keys_by_hand(window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = attend(*data, window=window, segment_ids=ids, implementation="banded")
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "square"])
def test_one_window_per_row_as_data(implementation):
    data, windows = arrays(23), jnp.asarray([3, 2**30])
    out = attend(*data, window=windows, implementation=implementation)
    np.testing.assert_allclose(out[0], by_hand(*data, 3)[0], atol=2e-6)
    np.testing.assert_allclose(out[1], by_hand(*data, None)[1], atol=2e-6)


@pytest.mark.parametrize("window", [None, 9, 16, 33, 200])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_blocks_of_visible_keys_by_hand(window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = attend(*data, window=window, segment_ids=ids, implementation="causal_blocks")
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


def test_blocks_leave_narrow_windows_and_windows_as_data_to_others():
    with pytest.raises(NotImplementedError, match="narrower than a block of 32"):
        attend(*arrays(41), window=8, implementation="causal_blocks")
    with pytest.raises(NotImplementedError, match="not a static number"):
        attend(*arrays(41), window=jnp.asarray([4, 5]), implementation="causal_blocks")
    with pytest.raises(NotImplementedError, match="single block"):
        attend(*arrays(32), window=None, implementation="causal_blocks")


@pytest.mark.parametrize(
    "implementation,window", [("banded", 5), ("square", 5), ("causal_blocks", None), ("causal_blocks", 9)]
)
def test_gradients_sinks_included_agree_with_the_reference(implementation, window):
    data, segments = arrays(41), jnp.asarray(SEGMENTS)

    def gradients(implementation):
        def f(*arrays):
            out = attend(*arrays, window=window, segment_ids=segments, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*data)

    for fast, slow in zip(gradients(implementation), gradients("reference"), strict=True):
        assert float(jnp.abs(slow).max()) > 1e-2
        np.testing.assert_allclose(fast, slow, atol=3e-6)


@pytest.mark.parametrize(
    "block,window", [(8, None), (8, 1), (8, 9), (8, 16), (8, 200), (13, None), (13, 13), (1024, None)]
)
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_pairs_of_blocks_by_hand(block, window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = attend(*data, window=window, segment_ids=ids, by=online_blocks.window_attention, block=block)
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


def test_pairs_of_blocks_take_one_window_per_row():
    data = arrays(41)
    out = attend(*data, window=jnp.asarray([3, 2**30]), by=online_blocks.window_attention, block=8)
    np.testing.assert_allclose(out[0], by_hand(*data, 3)[0], atol=2e-6)
    np.testing.assert_allclose(out[1], by_hand(*data, None)[1], atol=2e-6)


@pytest.mark.parametrize("window", [None, 5, np.asarray([3, 20])])
def test_gradients_over_pairs_of_blocks_agree_with_the_reference(window):
    data, segments = arrays(41), jnp.asarray(SEGMENTS)
    window = window if window is None or isinstance(window, int) else jnp.asarray(window)

    def gradients(**options):
        def f(*arrays):
            return jnp.sum(jnp.sin(attend(*arrays, window=window, segment_ids=segments, **options)))

        return jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(*data)

    found = gradients(by=online_blocks.window_attention, block=8)
    for fast, slow in zip(found, gradients(implementation="reference"), strict=True):
        assert float(jnp.abs(slow).max()) > 1e-2
        np.testing.assert_allclose(fast, slow, atol=3e-6)


def test_pairs_of_blocks_in_bfloat16_keep_the_dtype_and_float32_sums():
    data = arrays(41, dtype=jnp.bfloat16)
    out = attend(*data, window=None, by=online_blocks.window_attention, block=8)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), by_hand(*data, None), atol=0.02)


@pytest.mark.parametrize(
    "implementation,window,logits",
    [
        ("causal_blocks", None, 2 * 6 * 32 * 41),
        ("causal_blocks", 9, 2 * 6 * 32 * 41),
        ("banded", 5, 2 * 6 * 48 * 32),
        ("square", 5, 2 * 6 * 41 * 41),
    ],
)
def test_too_many_logits_are_left_to_pairs_of_blocks(monkeypatch, implementation, window, logits):
    data = arrays(41)
    monkeypatch.setattr(reference, "MOST_LOGITS", logits)
    attend(*data, window=window, implementation=implementation)
    monkeypatch.setattr(reference, "MOST_LOGITS", logits - 1)
    with pytest.raises(NotImplementedError, match="too many at a time"):
        attend(*data, window=window, implementation=implementation)
    monkeypatch.setattr(reference, "MOST_LOGITS", 0)
    out = attend(*data, window=window)
    np.testing.assert_array_equal(out, attend(*data, window=window, by=online_blocks.window_attention))


def test_a_band_as_wide_as_the_square_is_left_to_others():
    with pytest.raises(NotImplementedError, match="two blocks of 21"):
        attend(*arrays(41), window=21, implementation="banded")
    with pytest.raises(NotImplementedError, match="not a static number"):
        attend(*arrays(41), window=None, implementation="banded")
    out = attend(*arrays(41), window=21)
    np.testing.assert_allclose(out, by_hand(*arrays(41), 21), atol=2e-6)


def test_bfloat16_stays_near_float32():
    exact = attend(*arrays(41), window=5)
    rough = attend(*arrays(41, dtype=jnp.bfloat16), window=5)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough.astype(jnp.float32) - exact).max()) < 0.05


def ring(k, v, lengths, slots):
    """Ring caches of keys [batch, heads, dim, slots] and of values, to which each row wrote `lengths` positions."""
    keys = np.zeros((BATCH, KV_HEADS, DIM, slots), np.float32)
    values = np.zeros((BATCH, KV_HEADS, slots, DIM), np.float32)
    k, v = np.asarray(k), np.asarray(v)
    for row, length in enumerate(np.asarray(lengths)):
        for position in range(length):
            keys[row, :, :, position % slots] = k[row, position]
            values[row, :, position % slots] = v[row, position]
    return jnp.asarray(keys), jnp.asarray(values)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_decoding_from_a_ring_equals_the_last_query_of_the_square(window):
    seq, context = 23, 40
    q, k, v, sinks = arrays(seq)
    lengths = np.asarray([seq, 7])
    cache = ring(k, v, lengths, cache_slots(window, context))
    last = np.asarray(q)[np.arange(BATCH), lengths - 1]
    out = decode(jnp.asarray(last), *cache, sinks, jnp.asarray(lengths - 1), window=window)
    whole = by_hand(q, k, v, sinks, window)
    np.testing.assert_allclose(out[0], whole[0, seq - 1], atol=2e-6)
    np.testing.assert_allclose(out[1], whole[1, 6], atol=2e-6)


def test_slots_older_than_the_window_or_never_written_are_not_seen():
    q, k, v, sinks = arrays(9)
    keys, values = ring(k, v, [9, 4], 12)
    poisoned = np.array(keys)
    poisoned[0, ..., :6] = poisoned[1, ..., 4:] = 1e4
    out, unpoisoned = (
        decode(q[:, 0], jnp.asarray(given), values, sinks, jnp.asarray([8, 3]), window=3) for given in (poisoned, keys)
    )
    np.testing.assert_array_equal(out, unpoisoned)


def parts(q, k, v, chunks):
    """Slices each row's queries, and its keys and values in the layout of a cache."""
    q, k, v = (np.stack([np.asarray(x)[row, chunk] for row, chunk in enumerate(chunks)]) for x in (q, k, v))
    return jnp.asarray(q), jnp.asarray(k.transpose(0, 2, 3, 1)), jnp.asarray(v.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("implementation", ["blocks", "reference"])
@pytest.mark.parametrize("window,slots", [(None, 48), (1, 1), (9, 9), (200, 48)])
@pytest.mark.parametrize("start", [0, 32])
def test_a_chunk_sees_what_the_square_sees(implementation, window, slots, start):
    q, k, v, sinks = arrays(48)
    keys, values = ring(k, v, [start, start], slots)
    chunk = slice(start, start + 16)
    given = *parts(q, k, v, [chunk, chunk]), keys, values, sinks, jnp.int32(start)
    out = chunked(*given, window=window, implementation=implementation)
    expected = by_hand(q, k, v, sinks, window)[:, chunk]
    np.testing.assert_allclose(out, expected, atol=3e-6)
    if window is not None:  # the same window as data, one per row
        out = chunked_by_row(*given, window=jnp.asarray([window] * BATCH), implementation=implementation)
        np.testing.assert_allclose(out, expected, atol=3e-6)


@pytest.mark.parametrize("implementation", ["blocks", "reference"])
@pytest.mark.parametrize("window,slots", [(None, 48), (9, 9)])
def test_rows_of_a_chunk_may_start_at_positions_of_their_own(implementation, window, slots):
    q, k, v, sinks = arrays(48)
    starts = [32, 5]
    keys, values = ring(k, v, starts, slots)
    own = parts(q, k, v, [slice(start, start + 16) for start in starts])
    out = chunked(*own, keys, values, sinks, jnp.asarray(starts), window=window, implementation=implementation)
    whole = by_hand(q, k, v, sinks, window)
    for row, start in enumerate(starts):
        np.testing.assert_allclose(out[row], whole[row, start : start + 16], atol=3e-6)


def test_long_chunks_and_caches_are_cut_into_blocks():
    """Several blocks of queries (128) and of cached keys (512), the last of them partly filled."""
    data = normal(3, (1, 260, 4, 6), (1, 2, 6, 260), (1, 2, 260, 6), (1, 2, 6, 1024), (1, 2, 1024, 6), (4,))
    for window in (None, 700):
        for start in (260, 780):
            fast, slow = (
                chunked(*data, start=jnp.int32(start), window=window, implementation=implementation)
                for implementation in ("blocks", "reference")
            )
            np.testing.assert_allclose(fast, slow, atol=2e-6)


def test_scales_of_a_float8_cache_are_folded_into_logits_and_output():
    q, k, v, sinks = arrays(24)
    k_scale, v_scale = jnp.float32(0.011), jnp.float32(0.37)
    encode, decoded = jax.jit(encode_e4m3), jax.jit(lambda stored, scale: decode_e4m3(stored, jnp.float32) * scale)
    stored = encode(k, k_scale), encode(v, v_scale)
    read = [decoded(x, scale) for x, scale in zip(stored, (k_scale, v_scale), strict=True)]
    expected = by_hand(q, read[0], read[1], sinks, 9)
    assert np.abs(expected - by_hand(q, k, v, sinks, 9)).max() > 0.01
    keys, values = (x.astype(jnp.uint8) for x in ring(*stored, [24, 24], 9))
    scales = dict(k_scale=k_scale, v_scale=v_scale)
    out = decode(q[:, 23], keys, values, sinks, jnp.asarray([23, 23]), window=9, **scales)
    np.testing.assert_allclose(out, expected[:, 23], atol=3e-6)
    old = (x.astype(jnp.uint8) for x in ring(*stored, [16, 16], 9))
    given = *parts(q, *stored, [slice(16, None)] * BATCH), *old, sinks, jnp.int32(16)
    for implementation in ("blocks", "reference"):
        out = chunked(*given, window=9, implementation=implementation, **scales)
        np.testing.assert_allclose(out, expected[:, 16:], atol=3e-6)


@pytest.mark.parametrize("window", [None, 70])
def test_bytes_are_read_by_blocks_of_slots_that_hold_anything(window):
    """On CPUs, with rows in the first of three blocks, in the second, and past the end of the ring."""
    positions, slots = np.asarray([3, 120, 400]), 192
    q, k, v, sinks = normal(11, (3, HEADS, DIM), (3, KV_HEADS, DIM, slots), (3, KV_HEADS, slots, DIM), (HEADS,))
    scales = {"k_scale": jnp.float32(0.02), "v_scale": jnp.float32(0.05)}
    given = q, encode_e4m3(k, scales["k_scale"]), encode_e4m3(v, scales["v_scale"]), sinks
    run = jax.jit(decode_attention, static_argnames=("window", "implementation"))
    with recording() as choices:
        out = run(*given, positions, window=window, **scales)
    assert choices[-1].chosen == "blocks"
    whole = run(*given, positions, window=window, implementation="reference", **scales)
    np.testing.assert_allclose(out, whole, atol=3e-6)
    assert np.abs(out[0] - run(*given, np.asarray([4, 4, 4]), window=window, **scales)[0]).max() > 1e-3
    # Bit-identical to the row's result beside rows that are still in the first block.
    np.testing.assert_array_equal(out[0], run(*given, np.asarray([3, 3, 3]), window=window, **scales)[0])
    if window is not None:  # the same window as data, one per row
        by_row = jax.jit(decode_attention)(*given, positions, window=jnp.full(3, window), **scales)
        np.testing.assert_allclose(by_row, out, atol=1e-6)


@pytest.mark.parametrize("slots,dtype,words", [(192, jnp.float32, "for e4m3 on CPUs"), (9, jnp.uint8, "9 slots are")])
def test_other_caches_are_read_whole(slots, dtype, words):
    q, k, v, sinks = normal(12, (2, HEADS, DIM), (2, KV_HEADS, DIM, slots), (2, KV_HEADS, slots, DIM), (HEADS,))
    given = q, k.astype(dtype), v.astype(dtype), sinks, jnp.asarray([1, 5])
    with pytest.raises(NotImplementedError, match=words):
        decode_attention(*given, window=None, implementation="blocks")
