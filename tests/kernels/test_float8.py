import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.kernels.float8 import decode_e4m3, encode_e4m3

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
