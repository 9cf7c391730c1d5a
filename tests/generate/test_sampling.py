import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax.generate.sampling import BLOCK, inverse_draw, levels, sample

draw = jax.jit(inverse_draw)


@pytest.mark.parametrize(
    "choices,expected", [(1, 1), (128, 1), (129, 2), (BLOCK**2, 2), (BLOCK**2 + 1, 3), (201_088, 3)]
)
def test_a_large_vocabulary_has_more_levels(choices, expected):
    assert levels(choices) == expected


def test_one_level_is_the_inverse_of_the_cumulative_distribution():
    weights = jnp.asarray([[1.0, 0.0, 2.0, 1.0, 0.0]] * 7)
    numbers = jnp.asarray([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-23])
    np.testing.assert_array_equal(draw(weights, numbers[:, None]), [0, 0, 2, 2, 2, 3, 3])


@pytest.mark.parametrize("choices", [5, 128, 300])
def test_what_has_no_weight_is_never_drawn(choices):
    rng = np.random.default_rng(0)
    weights = rng.random((257, choices)).astype(np.float32) * (rng.random((257, choices)) < 0.05)
    weights[np.arange(257), rng.integers(0, choices, 257)] += 1e-30  # also where a row has nothing else
    ends = np.asarray([0, 1 - 2**-23], np.float32)[rng.integers(0, 2, (257, levels(choices)))]
    found = np.asarray(draw(jnp.asarray(weights), jnp.asarray(ends)))
    assert (weights[np.arange(257), found] > 0).all()


def test_a_tree_of_blocks_draws_by_the_weights():
    """300 choices fill three blocks, the last one partly: over a grid of numbers, each is drawn in its share."""
    weights = np.random.default_rng(0).gamma(0.3, size=300).astype(np.float32)
    grid = (np.arange(512) + 0.5) / 512
    numbers = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2).astype(np.float32)
    found = np.asarray(draw(jnp.broadcast_to(jnp.asarray(weights), (len(numbers), 300)), jnp.asarray(numbers)))
    shares = np.bincount(found, minlength=300) / len(numbers)
    expected = weights / weights.sum()
    np.testing.assert_allclose(shares, expected, atol=1.5 / 512)
    assert (shares[expected > 3 / 512] > 0).all() and (expected > 3 / 512).sum() > 50


def test_the_least_number_does_not_draw_a_token_that_has_hardly_any_weight(monkeypatch):
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    logits = jnp.zeros((2, 300)).at[:, :140].set(-80.0)
    np.testing.assert_array_equal(sample(logits, jnp.arange(2), jnp.arange(2), 1.0, 1.0), [140, 140])


def test_a_token_follows_from_its_seed_and_count_alone_and_a_rare_one_is_not_lost():
    logits = np.zeros((6, 97), np.float32)
    logits[:, 3] = 30.0  # all others together have a probability of 9e-12
    at_once = sample(jnp.asarray(logits), jnp.arange(6), jnp.arange(6), 1.0, 1.0)
    np.testing.assert_array_equal(at_once, [3] * 6)
    even = jnp.zeros((6, 97))
    seeds, drawn = jnp.asarray([4, 5, 4, 4, 9, 5]), jnp.asarray([0, 0, 1, 0, 2, 0])
    tokens = np.asarray(sample(even, seeds, drawn, 1.0, 1.0))
    assert tokens[0] == tokens[3] and tokens[1] == tokens[5] and len({*tokens[[0, 1, 2, 4]].tolist()}) == 4
    np.testing.assert_array_equal(sample(even[:6], seeds[::-1], drawn[::-1], 1.0, 1.0), tokens[::-1])
