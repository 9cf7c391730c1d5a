"""Scores of few traces together with the lens, on made-up scores whose truth is known."""

import numpy as np
import pytest

from puzzle_jax.evaluate.statistics import weighted_mean
from puzzle_jax.search.score import ScoreBook
from puzzle_jax.search.shrinkage import shrunk
from tests.search.test_adaptive import NOTHING, filled, traces


def made_up(alternatives=300, noise=0.6, of_lens=0.5, seed=0):
    """Truth over two powers of ten; both looks at it are off by log-normal factors, the lens by a slope as well."""
    source = np.random.default_rng(seed)
    truth = np.exp(source.normal(0.0, 1.2, alternatives))
    measured = truth * np.exp(source.normal(0.0, noise, alternatives))
    lens = 0.3 * truth**0.8 * np.exp(source.normal(0.0, of_lens, alternatives))
    return truth, measured, lens


def error(scores, truth):
    return float(np.mean((np.log(scores) - np.log(truth)) ** 2))


def test_both_together_are_nearer_than_either():
    """As near as the measurement, the lens seen through its slope, and the spread of the truth allow."""
    truth, measured, lens = made_up()
    together = shrunk(measured, 0.6 * measured, lens)
    best = 1 / (1 / 0.6**2 + 1 / (0.5 / 0.8) ** 2 + 1 / 1.2**2)
    assert error(measured, truth) == pytest.approx(0.36, rel=0.15)
    assert error(together, truth) == pytest.approx(best, rel=0.15)


def test_what_is_certain_stays_and_what_is_not_follows_the_lens():
    truth, measured, lens = made_up(noise=1e-3)
    np.testing.assert_allclose(shrunk(measured, 1e-3 * measured, lens), measured, rtol=1e-4)
    # One alternative that nobody knows anything of, among many that are known well.
    errors = np.append(1e-3 * measured, 1e4)
    odd = shrunk(np.append(measured, 50.0), errors, np.append(lens, np.median(lens)))[-1]
    assert odd == pytest.approx(np.median(truth), rel=0.35)


def test_without_a_use_for_the_lens_everything_stays():
    _, measured, lens = made_up(alternatives=11)
    np.testing.assert_array_equal(shrunk(measured, measured, lens), measured)
    _, measured, lens = made_up(alternatives=40)
    measured[3], measured[5], lens[7] = 0.0, -0.2, 0.0
    errors = measured.copy() * 0.5
    errors[9] = np.inf
    found = shrunk(measured, errors, lens)
    np.testing.assert_array_equal(found[[3, 5, 7, 9]], measured[[3, 5, 7, 9]])
    assert not np.any(found[[0, 1, 2, 4]] == measured[[0, 1, 2, 4]])


def test_a_book_without_a_lens_gives_its_means_and_one_with_it_uses_their_errors():
    book = filled([3.0, 2.0, 9.0], [0.5, 0.2, 4.0])
    np.testing.assert_array_equal(book.estimates(), book.means())
    truth, _, lens = made_up(alternatives=30)
    source = np.random.default_rng(1)
    book = ScoreBook.empty([NOTHING] * 30, traces(8))
    book.values[:, :5, 0] = truth[:, None] * np.exp(source.normal(0.0, 1.0, (30, 5)))
    book.lens = lens
    each = [weighted_mean(book.values[n, :5, 0], book.tokens[:5]) for n in range(30)]
    means, errors = (np.array(part) for part in zip(*each, strict=True))
    np.testing.assert_allclose(book.means(), means)
    np.testing.assert_allclose(book.estimates(), shrunk(means, errors, lens))
    # A draw that holds a trace twice counts it twice.
    drawn = [0, 0, 1, 3, 4]
    each = [weighted_mean(book.values[n, drawn, 0], book.tokens[drawn]) for n in range(30)]
    means, errors = (np.array(part) for part in zip(*each, strict=True))
    np.testing.assert_allclose(book.estimates(np.array(drawn)), shrunk(means, errors, lens))
