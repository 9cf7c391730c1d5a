import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.kernels.float8 import decode_e4m3, encode_e4m3, round_e4m3

CODES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_code_is_decoded_exactly(dtype):
    numbers = CODES[~np.isnan(CODES.astype(np.float32))]
    assert len(numbers) == 254
    decoded = jax.jit(lambda stored: decode_e4m3(stored, dtype))(jnp.asarray(numbers.view(np.uint8)))
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(np.asarray(decoded, np.float32), numbers.astype(np.float32))


def test_numbers_are_scaled_rounded_to_the_nearest_and_saturate():
    x = jnp.asarray([0.0, 1.0, -1.06, 1.07, 224.0, 896.0, -1e9, 1e-4], jnp.float32)
    read = decode_e4m3(encode_e4m3(x, jnp.float32(2.0)), jnp.float32) * 2.0
    np.testing.assert_array_equal(read, [0.0, 1.0, -1.0, 1.125, 224.0, 896.0, -896.0, 0.0])


def test_the_error_of_normal_numbers_is_half_a_step_at_most():
    x = jnp.asarray(np.random.default_rng(0).uniform(2.0**-6, 448, 5000), jnp.float32)
    read = decode_e4m3(encode_e4m3(x, jnp.float32(1.0)), jnp.float32)
    relative = np.abs(np.asarray(read - x)) / np.asarray(x)
    assert 0.055 < relative.max() <= 1 / 17 + 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_rounding_gives_what_bytes_would(scale):
    """Covers every e4m3 value, all midpoints, their neighbours, and values that saturate."""
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.unique(codes[np.isfinite(codes)])
    between = (codes[1:] + codes[:-1]) / 2
    beside = [np.nextafter(between, np.float32(far)) for far in (-np.inf, np.inf)]
    x = np.concatenate([codes, between, *beside, np.asarray([449, -1e6, 1e30, 2.0**-11], np.float32)]) * np.float32(
        scale
    )
    rounded = jax.jit(round_e4m3, static_argnums=2)(x, jnp.float32(scale), jnp.float32)
    stored = jax.jit(encode_e4m3)(x, jnp.float32(scale))
    np.testing.assert_array_equal(rounded, decode_e4m3(stored, jnp.float32))
    np.testing.assert_array_equal(jax.jit(round_e4m3, static_argnums=2)(x, jnp.float32(scale), jnp.bfloat16), rounded)
