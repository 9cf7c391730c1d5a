"""Intervals against formulas worked out by hand, and properties that the bootstrap must have."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puzzle_jax.errors import ConfigError
from puzzle_jax.evaluate.statistics import lower_bound, means, paired, percentile_interval, ratio, resample, wilson
from tests.support import present


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_both_ends_of_wilson_are_1_96_standard_errors_from_the_share(case):
    """An end p solves |share - p| = z sqrt(p (1 - p) / n), with the standard error at the end, not at the share."""
    right, count = case
    low, high = wilson(right, count)
    for end in (low, high):
        away = abs(right / count - end)
        assert away == pytest.approx(1.959963985 * math.sqrt(max(0.0, end * (1 - end)) / count), abs=1e-7)
    assert 0 <= low <= right / count <= high <= 1


def test_wilson_by_hand():
    """For 8 of 10, the textbook formula gives (0.9921 -+ 0.3136) / 1.3841."""
    assert wilson(8, 10) == (pytest.approx(0.490162, abs=1e-6), pytest.approx(0.943318, abs=1e-6))
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    for right, count in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ConfigError, match="no share"):
            wilson(right, count)


def test_a_draw_holds_as_many_problems_of_a_task_as_there_are():
    tasks = ["a", "b", "a", "c", "b", "a"]
    counts = resample(tasks, 500, seed=3)
    assert counts.shape == (500, 6)
    for task, number in (("a", 3), ("b", 2), ("c", 1)):
        assert (counts[:, [t == task for t in tasks]].sum(1) == number).all()
    assert np.array_equal(counts, resample(tasks, 500, seed=3))
    assert not np.array_equal(counts, resample(tasks, 500, seed=4))
    np.testing.assert_allclose(counts.mean(0), np.ones(6), atol=0.2)


def test_the_mean_of_a_draw_weighs_problems_by_how_often_they_came():
    counts = np.array([[1, 1, 1], [3, 0, 0], [0, 1, 2]])
    np.testing.assert_allclose(means(counts, np.array([3.0, 6.0, 9.0])), [6, 3, 8])
    np.testing.assert_allclose(means(counts, np.array([True, False, True])), [2 / 3, 1, 2 / 3])


def test_percentiles_are_values_that_were_drawn():
    values = np.arange(101.0)
    np.random.default_rng(0).shuffle(values)
    assert percentile_interval(values) == (2.0, 98.0)
    assert lower_bound(values) == 5.0
    values[values >= 97] = np.inf
    assert percentile_interval(values) == (2.0, None)
    assert lower_bound(np.full(20, -np.inf)) is None
    assert np.array_equal(ratio(np.array([1.0, 0.0, 3.0]), np.array([2.0, 0.0, 0.0])), [0.5, np.inf, np.inf])


def test_the_bootstrap_agrees_with_the_normal_approximation():
    generator = np.random.default_rng(1)
    right = generator.random(400) < 0.7
    low, high = percentile_interval(means(resample(["t"] * 400, 4000, 0), right))
    share = right.mean()
    error = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - error, abs=0.008)
    assert high == pytest.approx(share + error, abs=0.008)


def test_pairing_cancels_what_both_models_share():
    """For two models that differ on one problem, the interval is far narrower than for two independent samples."""
    reference = np.arange(200) % 2 == 0
    model = reference.copy()
    model[1] = True
    result = paired(model, reference, resample(["t"] * 200, 2000, 0))
    assert (result.won, result.lost, result.p_value) == (1, 0, 1.0)
    assert result.difference == pytest.approx(1 / 200)
    assert result.low == 0.0 and present(result.high) <= 4 / 200
    same = paired(reference, reference, resample(["t"] * 200, 50, 0))
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("won,lost", [(5, 1), (3, 3), (0, 7), (9, 2)])
def test_mcnemar_counts_coin_throws(won, lost):
    """The p-value equals the one from listing every outcome of that many fair coins."""
    model = np.array([True] * won + [False] * lost + [True] * 4)
    reference = np.array([False] * won + [True] * lost + [True] * 4)
    result = paired(model, reference, resample(["t"] * len(model), 10, 0))
    assert (result.won, result.lost) == (won, lost)
    throws = [sum(coins) for coins in itertools.product((0, 1), repeat=won + lost)]
    uneven = sum(abs(heads - (won + lost) / 2) >= abs(won - (won + lost) / 2) for heads in throws)
    assert result.p_value == pytest.approx(uneven / len(throws))
