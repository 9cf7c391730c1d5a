import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.window_attention import window_attention
from puzzle_jax.model.cache import cache_slots, fill_cache

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 3, 10


def arrays(seq, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (BATCH, seq, HEADS, DIM))
    k = jax.random.normal(keys[1], (BATCH, seq, KV_HEADS, DIM))
    v = jax.random.normal(keys[2], (BATCH, seq, KV_HEADS, DIM))
    return tuple(x.astype(dtype) for x in (q, k, v, jax.random.normal(keys[3], (HEADS,))))


def by_hand(q, k, v, sinks, window, segments=None) -> np.ndarray:
    """One query at a time, in float64, with windows as lists of visible positions."""
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
    out = window_attention(*data, window=window, segment_ids=ids, implementation=implementation)
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 20])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_a_band_of_keys_by_hand(window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = window_attention(*data, window=window, segment_ids=ids, implementation="banded")
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "square"])
def test_one_window_per_row_as_data(implementation):
    data, windows = arrays(23), jnp.asarray([3, 2**30])
    out = window_attention(*data, window=windows, implementation=implementation)
    np.testing.assert_allclose(out[0], by_hand(*data, 3)[0], atol=2e-6)
    np.testing.assert_allclose(out[1], by_hand(*data, None)[1], atol=2e-6)


@pytest.mark.parametrize("window", [None, 9, 16, 33, 200])
@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_blocks_of_visible_keys_by_hand(window, segments):
    data = arrays(41)
    ids = None if segments is None else jnp.asarray(segments)
    out = window_attention(*data, window=window, segment_ids=ids, implementation="causal_blocks")
    np.testing.assert_allclose(out, by_hand(*data, window, segments), atol=2e-6)


def test_blocks_leave_narrow_windows_and_windows_as_data_to_others():
    with pytest.raises(NotImplementedError, match="narrower than a block of 32"):
        window_attention(*arrays(41), window=8, implementation="causal_blocks")
    with pytest.raises(NotImplementedError, match="not a static number"):
        window_attention(*arrays(41), window=jnp.asarray([4, 5]), implementation="causal_blocks")
    with pytest.raises(NotImplementedError, match="single block"):
        window_attention(*arrays(32), window=None, implementation="causal_blocks")


@pytest.mark.parametrize(
    "implementation,window", [("banded", 5), ("square", 5), ("causal_blocks", None), ("causal_blocks", 9)]
)
def test_gradients_sinks_included_agree_with_the_reference(implementation, window):
    data, segments = arrays(41), jnp.asarray(SEGMENTS)

    def gradients(implementation):
        def f(*arrays):
            out = window_attention(*arrays, window=window, segment_ids=segments, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.grad(f, argnums=(0, 1, 2, 3))(*data)

    for fast, slow in zip(gradients(implementation), gradients("reference"), strict=True):
        assert float(jnp.abs(slow).max()) > 1e-2
        np.testing.assert_allclose(fast, slow, atol=3e-6)


def test_a_band_as_wide_as_the_square_is_left_to_others():
    with pytest.raises(NotImplementedError, match="two blocks of 21"):
        window_attention(*arrays(41), window=21, implementation="banded")
    with pytest.raises(NotImplementedError, match="not a static number"):
        window_attention(*arrays(41), window=None, implementation="banded")
    out = window_attention(*arrays(41), window=21)
    np.testing.assert_allclose(out, by_hand(*arrays(41), 21), atol=2e-6)


def test_bfloat16_stays_near_float32():
    exact = window_attention(*arrays(41), window=5)
    rough = window_attention(*arrays(41, dtype=jnp.bfloat16), window=5)
    assert rough.dtype == jnp.bfloat16
    assert float(jnp.abs(rough.astype(jnp.float32) - exact).max()) < 0.05


@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_decoding_from_a_ring_equals_the_last_query_of_the_square(window):
    seq, context = 23, 40
    q, k, v, sinks = arrays(seq)
    lengths = jnp.asarray([seq, 7])
    cache = fill_cache(k, v, lengths, cache_slots(window, context))
    assert cache.k.shape[1] == (context if window is None else min(window, context))
    last = jnp.take_along_axis(q, (lengths - 1)[:, None, None, None], axis=1)[:, 0]
    out = decode_attention(last, cache.k, cache.v, sinks, lengths - 1, window=window)
    whole = by_hand(q, k, v, sinks, window)
    np.testing.assert_allclose(out[0], whole[0, seq - 1], atol=2e-6)
    np.testing.assert_allclose(out[1], whole[1, 6], atol=2e-6)


def test_slots_older_than_the_window_or_never_written_are_not_seen():
    q, k, v, sinks = arrays(9)
    lengths = jnp.asarray([9, 4])
    cache = fill_cache(k, v, lengths, 12)
    poisoned = cache.k.at[0, :6].set(jnp.nan).at[1, 4:].set(jnp.nan)
    visible = jnp.isfinite(poisoned).all(axis=(2, 3))
    np.testing.assert_array_equal(visible.sum(axis=1), [6, 4])
    out = decode_attention(
        q[:, 0], jnp.where(visible[:, :, None, None], cache.k, 1e4), cache.v, sinks, lengths - 1, window=3
    )
    plain = decode_attention(q[:, 0], cache.k, cache.v, sinks, lengths - 1, window=3)
    np.testing.assert_array_equal(out, plain)
