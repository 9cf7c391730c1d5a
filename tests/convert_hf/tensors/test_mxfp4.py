import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.errors import PuzzleError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.mxfp4 import decode as decode_on_device
from puzzle_jax.train.fake_quant import round_to_mxfp4

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def every_code_at_every_scale() -> tuple[np.ndarray, np.ndarray]:
    """One output per scale byte 0..254, each of sixteen groups that hold every code byte once."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)
    return np.tile(codes, (1, 255, 1, 1)), np.tile(scales, (1, 1, 16))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_decode_is_exact_for_every_code_and_scale(dtype):
    blocks, scales = every_code_at_every_scale()
    table = np.concatenate([MAGNITUDES, -MAGNITUDES])  # float64, in which no product rounds
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(1, 255, 16, 32)
    exact = (table[nibbles] * 2.0 ** (scales.astype(float) - 127)[..., None]).reshape(1, 255, -1).swapaxes(1, 2)
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32).astype(dtype)
    got = mxfp4.decode(blocks, scales, dtype)
    assert got.shape == (1, 512, 255) and got.dtype == dtype
    np.testing.assert_array_equal(got.view(np.uint8), np.where(exact == 0, got, expected).view(np.uint8))
    assert np.signbit(got[0, 16, 0].astype(np.float32)) == np.signbit(table[nibbles[0, 0, 0, 16]])


def test_decode_agrees_with_the_decoder_on_the_device():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 7, 2, 16), dtype=np.uint8)
    scales = rng.integers(2, 254, (3, 7, 2), dtype=np.uint8)
    on_device = decode_on_device(MXFP4(jnp.asarray(blocks.reshape(*scales.shape[:2], -1)), jnp.asarray(scales)))
    np.testing.assert_array_equal(mxfp4.decode(blocks, scales), np.asarray(on_device))


def test_encode_rounds_to_the_nearest_code_and_clips_nothing():
    rng = np.random.default_rng(1)
    values = (rng.standard_normal((2, 64, 5)) * 10.0 ** rng.integers(-6, 6, (2, 1, 5))).astype(np.float32)
    blocks, scales = mxfp4.encode(values)
    assert blocks.shape == (2, 5, 2, 16) and scales.shape == (2, 5, 2)
    step = np.repeat(2.0 ** (scales.astype(float) - 127), 32, axis=-1).swapaxes(1, 2)
    largest = np.repeat(np.abs(values).reshape(2, 2, 32, 5).max(2), 32, axis=1)
    assert (largest <= 6 * step).all() and (largest > 3 * step).all()  # the smallest power of two that clips nothing
    grid = np.concatenate([MAGNITUDES, -MAGNITUDES])
    nearest = np.abs(values[..., None] / step[..., None] - grid).min(-1)
    error = np.abs(values - mxfp4.decode(blocks, scales)) / step
    np.testing.assert_allclose(error, nearest, atol=1e-6)


def test_ties_go_to_the_even_code():
    values = np.zeros((1, 32, 1), np.float32)
    values[0, :8, 0] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    assert mxfp4.decode(*mxfp4.encode(values))[0, :8, 0].tolist() == [6, 0, 1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("amax, byte", [(6.0, 127), (6.0000005, 128), (3.0, 126), (3.0000002, 127), (4.0, 127)])
def test_shared_exponent_at_its_boundaries(amax, byte):
    values = np.full((1, 32, 1), -amax, np.float32)
    assert mxfp4.encode(values)[1].item() == byte


def test_encoding_again_keeps_values():
    rng = np.random.default_rng(2)
    blocks = rng.integers(0, 256, (2, 3, 2, 16), dtype=np.uint8)
    scales = rng.integers(100, 140, (2, 3, 2), dtype=np.uint8)
    values = mxfp4.decode(blocks, scales)
    np.testing.assert_array_equal(mxfp4.decode(*mxfp4.encode(values)), values)


def test_the_encoder_loses_nothing_after_training_with_its_rounding():
    values = np.random.default_rng(3).standard_normal((2, 64, 6)).astype(np.float32)
    values[0, :32, 0] = 0
    rounded = np.asarray(round_to_mxfp4(jnp.asarray(values)))
    np.testing.assert_array_equal(mxfp4.decode(*mxfp4.encode(values)), rounded)
    np.testing.assert_array_equal(mxfp4.decode(*mxfp4.encode(rounded)), rounded)


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1.7e38])
def test_extreme_magnitudes_stay_within_the_scales(largest):
    values = np.full((1, 32, 1), largest, np.float32)
    blocks, scales = mxfp4.encode(values)
    assert 2 <= scales.item() <= 254
    np.testing.assert_allclose(mxfp4.decode(blocks, scales), values, rtol=0.25, atol=2.0**-126)


def test_zeros_and_refusals():
    blocks, scales = mxfp4.encode(np.zeros((1, 32, 2), np.float32))
    assert not blocks.any() and (scales == 127).all()
    with pytest.raises(PuzzleError, match="expert 1 holds values that are not finite or beyond"):
        mxfp4.encode(np.stack([np.zeros((32, 1)), np.full((32, 1), np.inf)]).astype(np.float32))
    with pytest.raises(PuzzleError, match="expert 0"):
        mxfp4.encode(np.full((1, 32, 1), 3.4e38, np.float32))
    with pytest.raises(PuzzleError, match="33 inputs"):
        mxfp4.encode(np.zeros((1, 33, 1), np.float32))
