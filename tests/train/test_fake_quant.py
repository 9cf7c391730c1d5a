"""Fake quantisation: the grid by hand, agreement with the checkpoint codec, and the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.convert_hf.tensors import mxfp4
from puzzle_jax.train.fake_quant import fake_quantize, fake_quantize_experts, round_to_mxfp4


def column(values):
    """One group of 32 along the contraction axis."""
    weight = np.zeros((1, 32, 1), np.float32)
    weight[0, : len(values), 0] = values
    return jnp.asarray(weight)


def test_values_round_to_the_nearest_code_with_ties_to_even():
    values = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.26, 5.1, 0.2]
    expected = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, -0.5, 6.0, 0.0]
    np.testing.assert_array_equal(round_to_mxfp4(column(values))[0, : len(values), 0], expected)


def test_the_shared_exponent_never_clips():
    # 6.5 needs the next power of two: steps double.
    np.testing.assert_array_equal(round_to_mxfp4(column([6.5, 1.6, 0.4]))[0, :3, 0], [6.0, 2.0, 0.0])
    np.testing.assert_array_equal(round_to_mxfp4(column([0.75, 0.1]))[0, :2, 0], [0.75, 0.125])
    assert not np.any(round_to_mxfp4(column([])))


@pytest.mark.parametrize("scale", [1e-20, 0.03, 7.0])
def test_rounding_equals_packing_and_unpacking(scale):
    weight = jax.random.normal(jax.random.key(1), (3, 64, 5)) * scale
    packed = mxfp4.decode(*mxfp4.encode(np.asarray(weight)), np.float32)
    np.testing.assert_array_equal(np.asarray(round_to_mxfp4(weight)), packed)
    np.testing.assert_array_equal(round_to_mxfp4(round_to_mxfp4(weight)), round_to_mxfp4(weight))


def test_gradients_pass_straight_through():
    weight = jax.random.normal(jax.random.key(2), (2, 32, 3))
    factor = jax.random.normal(jax.random.key(3), weight.shape)
    gradient = jax.grad(lambda w: jnp.sum(fake_quantize(w) * factor))(weight)
    np.testing.assert_array_equal(gradient, factor)
    np.testing.assert_allclose(fake_quantize(weight), round_to_mxfp4(weight), rtol=1e-6)


def test_only_expert_matrices_are_rounded():
    params = {
        "head": jnp.full((2, 3), 0.3),
        "layers": [
            {
                "attention": {"q_weight": jnp.full((32, 4), 0.3)},
                "moe": {
                    "gate_up": column([6.0, 0.3]),
                    "down": column([6.0, 0.8]),
                    "down_bias": jnp.full((1, 1), 0.3),
                },
            }
        ],
    }
    rounded = fake_quantize_experts(params)
    np.testing.assert_allclose(rounded["layers"][0]["moe"]["gate_up"][0, :2, 0], [6.0, 0.5])
    np.testing.assert_allclose(rounded["layers"][0]["moe"]["down"][0, :2, 0], [6.0, 1.0])
    assert rounded["layers"][0]["moe"]["down_bias"] is params["layers"][0]["moe"]["down_bias"]
    assert rounded["layers"][0]["attention"]["q_weight"] is params["layers"][0]["attention"]["q_weight"]
    assert rounded["head"] is params["head"]


def test_inputs_must_fill_groups():
    with pytest.raises(ValueError, match="weight has 48 inputs, but MXFP4 groups need a multiple of 32"):
        round_to_mxfp4(jnp.zeros((2, 48, 3)))
