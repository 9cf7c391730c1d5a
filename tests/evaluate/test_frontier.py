"""Curves against values worked out by hand and against dense sampling."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from puzzle_jax.evaluate.frontier import Curve, above_everywhere, common_gap, reachable_gap
from tests.support import present

# Parent: high (1, 0.8), medium (2, 0.6), low (4, 0.2).
PARENT = Curve.of([(4.0, 0.2), (1.0, 0.8), (2.0, 0.6)])

points = st.lists(
    st.tuples(st.integers(1, 60).map(lambda n: n / 10), st.integers(0, 20).map(lambda n: n / 20)),
    min_size=1,
    max_size=5,
)


def test_a_curve_sorts_its_points_and_keeps_the_best_of_one_rate():
    assert PARENT.rates.tolist() == [1, 2, 4] and PARENT.accuracies.tolist() == [0.8, 0.6, 0.2]
    assert Curve.of([(1.0, 0.3), (1.0, 0.5), (1.0, 0.4)]).accuracies.tolist() == [0.5]


def test_the_smallest_gap_lies_at_a_knot_of_either_curve():
    """A child from (1.5, 0.75) to (3, 0.35) is above the parent by 0.05 at 1.5 and 0.0167 at 2, below by 0.05 at 3."""
    gap = present(common_gap(Curve.of([(1.5, 0.75), (3.0, 0.35)]), PARENT))
    assert (gap.low, gap.high, gap.rate) == (1.5, 3.0, 3.0)
    assert gap.accuracy == pytest.approx(0.35 - 0.4)
    gap = present(common_gap(Curve.of([(1.5, 0.75), (3.0, 0.41)]), PARENT))
    assert gap.rate == 3.0 and gap.accuracy == pytest.approx(0.01)
    # With the parent's knot at 2 inside the child's only segment.
    gap = present(common_gap(Curve.of([(1.0, 0.85), (4.0, 0.3)]), PARENT))
    assert gap.rate == 1.0 and gap.accuracy == pytest.approx(0.05)
    gap = present(common_gap(Curve.of([(1.0, 0.95), (4.0, 0.22)]), Curve.of([(1.0, 0.8), (2.0, 0.7), (4.0, 0.2)])))
    assert gap.rate == 2.0 and gap.accuracy == pytest.approx(0.95 - 0.73 / 3 - 0.7)


def test_curves_without_a_common_rate_have_no_gap():
    assert common_gap(Curve.of([(5.0, 0.9), (9.0, 0.8)]), PARENT) is None
    assert common_gap(Curve.of([(0.5, 0.9)]), PARENT) is None
    touching = present(common_gap(Curve.of([(4.0, 0.3), (9.0, 0.1)]), PARENT))
    assert (touching.low, touching.high) == (4.0, 4.0) and touching.accuracy == pytest.approx(0.1)


def test_a_fast_child_is_compared_with_the_best_of_a_slow_parent_by_what_it_can_reach():
    fast = Curve.of([(5.0, 0.75), (9.0, 0.3)])
    # At every rate up to 4 the child attains 0.75; the parent at 1 attains 0.8.
    gap = present(reachable_gap(fast, PARENT))
    assert gap.rate == 1.0 and gap.accuracy == pytest.approx(-0.05)
    assert present(reachable_gap(Curve.of([(5.0, 0.85), (9.0, 0.3)]), PARENT)).accuracy == pytest.approx(0.05)
    # The common range hides that the child never attains the parent's best.
    child = Curve.of([(2.0, 0.7), (4.0, 0.4)])
    assert present(common_gap(child, PARENT)).accuracy > 0 > present(reachable_gap(child, PARENT)).accuracy
    assert reachable_gap(Curve.of([(1.0, 0.9), (3.9, 0.9)]), PARENT) is None


def test_what_is_reachable_never_rises_and_bends_where_the_line_passes_its_level():
    # From the right: 0.2 at 4, up to 0.6 at 3, down to 0.3 at 2, then up to 0.9 at 1, passing 0.6 at 1.5.
    reach = Curve.of([(1.0, 0.9), (2.0, 0.3), (3.0, 0.6), (4.0, 0.2)]).reachable()
    assert reach.rates.tolist() == pytest.approx([1, 1.5, 2, 3, 4])
    assert reach.accuracies.tolist() == pytest.approx([0.9, 0.6, 0.6, 0.6, 0.2])


@given(points)
def test_what_is_reachable_is_the_best_from_a_rate_upwards(found):
    curve = Curve.of(found)
    reach = curve.reachable()
    grid = np.unique(np.concatenate([np.linspace(curve.rates[0], curve.rates[-1], 301), curve.rates]))
    best = np.maximum.accumulate(curve.at(grid)[::-1])[::-1]
    np.testing.assert_allclose(reach.at(grid), best, atol=1e-9)


@given(points, points)
def test_no_rate_has_a_smaller_gap(first, second):
    model, reference = Curve.of(first), Curve.of(second)
    gap = common_gap(model, reference)
    low, high = max(model.rates[0], reference.rates[0]), min(model.rates[-1], reference.rates[-1])
    assert (gap is None) == (low > high)
    if gap is not None:
        grid = np.linspace(low, high, 201)
        assert gap.accuracy <= (model.at(grid) - reference.at(grid)).min() + 1e-9
        there = np.array([gap.rate])
        assert gap.accuracy == pytest.approx((model.at(there) - reference.at(there))[0])
    reachable = reachable_gap(model, reference)
    assume(reachable is not None)
    assert reachable is not None
    grid = np.linspace(0, reference.rates[-1], 201)
    assert reachable.accuracy <= (model.reachable().at(grid) - reference.reachable().at(grid)).min() + 1e-9


def test_draws_without_an_answer_count_as_not_above():
    above, below = (Curve.of([(1.0, a), (4.0, b)]) for a, b in ((0.9, 0.7), (0.9, 0.1)))
    apart = Curve.of([(7.0, 0.9), (8.0, 0.9)])
    draws = [(above, PARENT)] * 18 + [(below, PARENT)] + [(apart, PARENT)]
    result = above_everywhere(common_gap, above, PARENT, draws)
    assert (result.probability, result.answered) == (0.9, 0.95)
    assert present(result.gap).accuracy == pytest.approx(0.1)
    assert result.lower_bound is None
    result = above_everywhere(common_gap, above, PARENT, [(above, PARENT)] * 90 + [(below, PARENT)] * 10)
    assert result.lower_bound == pytest.approx(-0.1) and result.answered == 1.0
    # Of two equal curves, neither is above the other.
    assert above_everywhere(common_gap, PARENT, PARENT, [(PARENT, PARENT)] * 3).probability == 0.0
