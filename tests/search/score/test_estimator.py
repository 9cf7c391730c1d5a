"""Scores of few traces combined with those of the lens, on made-up scores whose truth is known."""

import numpy as np
import pytest

from puzzle_jax.evaluate.statistics import weighted_mean
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.score.estimator import estimate, kinds_of, post_stratified, shrunk
from puzzle_jax.search.score.measurements import ScoreTable
from puzzle_jax.search.score.replace_one import Alternative

ONE_LAYER = np.zeros(300, int)


def made_up(alternatives=300, noise=0.6, of_lens=0.5, seed=0):
    """Truth over two powers of ten, and two estimates of it with log-normal errors; the lens has a slope as well."""
    source = np.random.default_rng(seed)
    truth = np.exp(source.normal(0.0, 1.2, alternatives))
    measured = truth * np.exp(source.normal(0.0, noise, alternatives))
    lens = 0.3 * truth**0.8 * np.exp(source.normal(0.0, of_lens, alternatives))
    return truth, measured, lens


def error(scores, truth):
    return float(np.mean((np.log(scores) - np.log(truth)) ** 2))


# Shrinkage ----------------------------------------------------------------------------------------------------------


def test_both_together_are_nearer_than_either():
    """The error is the least that the measurement, the lens corrected for its slope, and the spread of truth allow."""
    truth, measured, lens = made_up()
    together = shrunk(measured, 0.6 * measured, lens, ONE_LAYER)
    best = 1 / (1 / 0.6**2 + 1 / (0.5 / 0.8) ** 2 + 1 / 1.2**2)
    assert error(measured, truth) == pytest.approx(0.36, rel=0.15)
    assert error(together, truth) == pytest.approx(best, rel=0.15)


def test_a_lens_that_errs_by_a_factor_of_each_layer_is_as_good_as_one_that_does_not():
    truth, measured, lens = made_up()
    layers = np.arange(300) % 5
    off = lens * np.array([0.1, 4.0, 1.0, 9.0, 0.5])[layers]
    best = 1 / (1 / 0.6**2 + 1 / (0.5 / 0.8) ** 2 + 1 / 1.2**2)
    assert error(shrunk(measured, 0.6 * measured, off, layers), truth) == pytest.approx(best, rel=0.15)
    # Without the layers such a lens would be of little use.
    assert error(shrunk(measured, 0.6 * measured, off, ONE_LAYER), truth) > 1.3 * best


def test_what_is_certain_stays_and_what_is_not_follows_the_lens():
    truth, measured, lens = made_up(noise=1e-3)
    np.testing.assert_allclose(shrunk(measured, 1e-3 * measured, lens, ONE_LAYER), measured, rtol=1e-4)
    # One alternative of which nothing is known, among many that are known well.
    errors = np.append(1e-3 * measured, 1e4)
    odd = shrunk(np.append(measured, 50.0), errors, np.append(lens, np.median(lens)), np.zeros(301, int))[-1]
    assert odd == pytest.approx(np.median(truth), rel=0.35)


def test_without_a_use_for_the_lens_everything_stays():
    _, measured, lens = made_up(alternatives=11)
    np.testing.assert_array_equal(shrunk(measured, measured, lens, ONE_LAYER[:11]), measured)
    _, measured, lens = made_up(alternatives=40)
    measured[3], measured[5], lens[7] = 0.0, -0.2, 0.0
    errors = measured.copy() * 0.5
    errors[9] = np.inf
    found = shrunk(measured, errors, lens, ONE_LAYER[:40])
    np.testing.assert_array_equal(found[[3, 5, 7, 9]], measured[[3, 5, 7, 9]])
    assert not np.any(found[[0, 1, 2, 4]] == measured[[0, 1, 2, 4]])


# Weights and correction ---------------------------------------------------------------------------------------------

TOKENS, KINDS = np.array([3, 5, 2, 7, 11, 4]), np.array([0, 0, 1, 1, 2, 2])  # 8, 9 and 15 tokens of 32


def test_kinds_are_numbered_as_they_appear():
    assert kinds_of([("add", "low"), ("chain", "low"), ("add", "low")]).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([1, 1, 1, 1, 1, 1], TOKENS / 32),
        ([1, 0, 0, 1, 1, 1], np.array([8, 0, 0, 9, 11, 4]) / 32),
        ([0, 1, 2, 1, 0, 0], np.array([0, 8, 9 * 4 / 11, 9 * 7 / 11, 0, 0]) / 17),
        ([0, 0, 0, 0, 0, 0], np.full(6, np.nan)),
    ],
    ids=["all", "one of some", "a kind without traces and a trace drawn twice", "none"],
)
def test_kinds_weigh_what_they_have_in_tokens(times, expected):
    np.testing.assert_allclose(post_stratified(np.array([times], float), TOKENS, KINDS)[0], expected)


def test_few_alternatives_are_corrected_by_the_lens_on_traces_they_were_not_scored_on():
    """Too few for a fit, so that only weights and correction act; by hand, for one kind of traces of one token."""
    tokens, kinds, layers = np.ones(6, int), np.zeros(6, int), np.zeros(3, int)
    times = np.array([[1, 1, 1, 0, 0, 0]] * 3, float)
    lens = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 3.0]] * 3)  # means of 2 on the scored traces, 3 on all
    values = np.array(
        [[4.0, 5.0, 6.0, np.nan, np.nan, np.nan], [6.0, 5.0, 4.0, 9.0, 9.0, 9.0], [0.0, 10.0, 20.0, 0, 0, 0]]
    )
    found = estimate(values, lens, times=times, tokens=tokens, kinds=kinds, layers=layers)
    # Slopes 1, -1 (not believed) and 10 (3 believed).
    np.testing.assert_allclose(found, [5 + 0.5, 5.0, 10 + 1.5])
    low = estimate(
        values[:1] / 100, lens[:1] * [1, 1, 1, 0, 0, 0], times=times[:1], tokens=tokens, kinds=kinds, layers=layers[:1]
    )
    np.testing.assert_allclose(low, [0.05 - 0.005])
    steep = estimate(
        values[:1] - 3.99, lens[:1] - [0, 0, 0, 9, 9, 9], times=times[:1], tokens=tokens, kinds=kinds, layers=layers[:1]
    )
    np.testing.assert_allclose(steep, [0.3 * 1.01])  # a correction leaves 0.3 of a score
    lens[0, 1] = np.nan
    unseen = estimate(values, lens, times=times, tokens=tokens, kinds=kinds, layers=layers)
    np.testing.assert_allclose(unseen, [5.0, 5.0, 10 + 1.5])


def test_estimates_of_few_traces_rank_better_than_their_means():
    """The lens sees how much each trace hurts each alternative, up to a factor that depends mostly on the layer."""
    source = np.random.default_rng(3)
    alternatives, traces = 120, 90
    layers, kinds = np.arange(alternatives) % 4, np.arange(traces) % 3
    tokens = np.array([4, 9, 23])[kinds]
    truth = np.exp(source.normal(0.0, 0.5, alternatives))
    of_trace = np.exp(source.normal(0.0, 1.0, (alternatives, traces)))
    values = truth[:, None] * of_trace * np.exp(source.normal(0.0, 0.3, of_trace.shape))
    factor = np.array([0.3, 1.0, 2.0, 0.8])[layers] * np.exp(source.normal(0.0, 0.3, alternatives))
    lens = (truth * factor)[:, None] * of_trace
    gold = values @ tokens / tokens.sum()
    times = np.zeros(values.shape)
    times[:, :9] = 1.0
    weights = times * tokens
    means = np.sum(values * weights, axis=1) / weights.sum(axis=1)
    found = estimate(values, lens, times=times, tokens=tokens, kinds=kinds, layers=layers)
    assert error(found, gold) < 0.5 * error(means, gold)


# In a table ----------------------------------------------------------------------------------------------------------


def book_of(alternatives, count):
    kinds = [(task, effort) for task in ("a", "b") for effort in ("low", "high")]
    traces = [Trace(*kinds[n % 4], n, {}, (1, 2), (3,) * (1 + n % 3), 1.0, False) for n in range(count)]
    return ScoreTable.empty([(n % 5, Alternative(np.ones(3, bool), None)) for n in range(alternatives)], traces)


def test_a_book_without_a_lens_gives_its_means_and_one_with_it_its_estimates():
    truth, _, lens = made_up(alternatives=30)
    source = np.random.default_rng(1)
    table = book_of(30, 8)
    table.values[:, :5, 0] = truth[:, None] * np.exp(source.normal(0.0, 1.0, (30, 5)))
    means = [weighted_mean(table.values[n, :5, 0], table.tokens[:5])[0] for n in range(30)]
    np.testing.assert_allclose(table.means(), means)
    np.testing.assert_array_equal(table.estimates(), table.means())
    table.lens = lens[:, None] * np.exp(source.normal(0.0, 1.0, (30, 8)))
    known = {
        "tokens": np.array([1, 2, 3, 1, 2, 3, 1, 2]),
        "kinds": np.array([0, 1, 2, 3, 0, 1, 2, 3]),
        "layers": np.arange(30) % 5,
    }
    times = np.array([[1.0] * 5 + [0.0] * 3] * 30)
    np.testing.assert_allclose(table.estimates(), estimate(table.values[..., 0], table.lens, times=times, **known))
    # A draw that holds a trace twice counts it twice, as if it were two traces.
    drawn, values = [0, 0, 1, 3, 4, 6], np.nan_to_num(table.values[..., 0])
    times = np.array([[2.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 30)
    twice = estimate(values, table.lens, times=times, **known)
    np.testing.assert_allclose(table.estimates(np.array(drawn)), twice)
    assert np.isnan(table.estimates(np.array([6, 7]))).all()


def test_a_trace_drawn_twice_counts_as_two():
    source = np.random.default_rng(2)
    values, lens = np.exp(source.normal(0.0, 1.0, (2, 20, 4)))
    tokens, kinds, layers = np.array([3, 1, 4, 1]), np.zeros(4, int), np.zeros(20, int)
    doubled = [0, 0, 1, 2, 3]
    once = np.ones((20, 5))
    times = np.array([[2.0, 1.0, 1.0, 1.0]] * 20)
    # The mean of the lens must be the same in both, so it gets no differences between traces.
    lens[:] = lens[:, :1]
    found = estimate(values, lens, times=times, tokens=tokens, kinds=kinds, layers=layers)
    apart = estimate(
        values[:, doubled], lens[:, doubled], times=once, tokens=tokens[doubled], kinds=kinds[doubled], layers=layers
    )
    np.testing.assert_allclose(found, apart)
