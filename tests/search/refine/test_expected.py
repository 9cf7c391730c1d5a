"""Expected KLs: what is kept of measurements that noise explains, and of those that it does not."""

import numpy as np
import pytest

from puzzle_jax.search.refine.expected import expected_kls, expected_of_child

TOKENS = np.array([5, 9, 2, 7, 11, 3])


def test_measurements_without_noise_are_kept():
    kl = np.array([[0.3] * 6, [0.2] * 6, [0.9] * 6])
    np.testing.assert_allclose(expected_kls([0.1, 0.2, 0.3], kl, TOKENS), [0.3, 0.2, 0.9], rtol=1e-6)


def test_what_all_children_share_is_no_noise():
    """Traces differ by far more than children do, but alike for all."""
    hard = np.array([0.0, 2.0, 5.0, 0.5, 1.0, 7.0])
    kl = np.array([hard + 0.3, hard + 0.2, hard + 0.9])
    expected = expected_kls([0.1, 0.2, 0.3], kl, TOKENS)
    mean = np.average(hard, weights=TOKENS)
    np.testing.assert_allclose(expected, mean + np.array([0.3, 0.2, 0.9]), rtol=1e-6)


def test_differences_within_the_noise_give_way_to_predictions():
    """Three children whose measurements differ by less than noise lie on the line through their predictions."""
    source = np.random.default_rng(0)
    kl = 0.5 + source.normal(0, 0.4, (3, 6))
    kl += 0.5 - np.average(kl, axis=1, weights=TOKENS)[:, None] + np.array([[0.01], [-0.01], [0.0]])
    expected = expected_kls([0.24, 0.25, 0.26], kl, TOKENS)
    np.testing.assert_allclose(expected, 1.5 / 0.75 * np.array([0.24, 0.25, 0.26]), rtol=1e-6)


def test_the_best_of_many_alike_is_not_expected_to_be_as_good_as_it_was_measured():
    """The best measurement of 40 children with the same true KL is low by luck; the KL expected of it is not."""
    source = np.random.default_rng(1)
    tokens = np.full(50, 7)
    kl = 0.5 + source.normal(0, 0.6, (40, 50))
    measured = kl.mean(axis=1)
    expected = expected_kls([0.3] * 40, kl, tokens)
    best = int(np.argmin(measured))
    assert measured[best] < 0.35
    assert expected[best] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("predicted", ([0.0, 0.0, 0.0], [0.2, 0.0, 0.3], [-0.1, 0.4, 0.2]))
def test_few_predictions_fit_no_line(predicted):
    kl = np.array([[0.3] * 6, [0.2] * 6, [0.9] * 6])
    np.testing.assert_allclose(expected_kls(predicted, kl, TOKENS), [0.3, 0.2, 0.9])
    np.testing.assert_allclose(expected_kls([0.2, 0.3, 0.4], kl[:, :1], TOKENS[:1]), [0.3, 0.2, 0.9])


@pytest.mark.parametrize("luck", [0.05, 0.0])
def test_the_final_child_is_expected_to_be_as_measured_but_for_luck(luck):
    """Means over 4 + 9 and over 5 + 2 tokens."""
    one, other = (np.array([0.2, 0.4]), np.array([4, 9])), (np.array([0.5, 0.1]), np.array([5, 2]))
    found = expected_of_child(luck, one, other)
    values = np.array([0.2 + luck, 0.4 + luck, 0.5, 0.1])
    mean = (values * [4, 9, 5, 2]).sum() / 20
    assert found["kl"] == pytest.approx(mean)
    assert found["kl_se"] == pytest.approx((4 / 3 * ((values - mean) ** 2 * [16, 81, 25, 4]).sum()) ** 0.5 / 20)
