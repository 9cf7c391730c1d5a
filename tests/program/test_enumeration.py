"""Bounded enumeration against all choices, and its bounds against the optimum."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from puzzle_jax.program import enumeration
from puzzle_jax.program.enumeration import Case, enumerate_least


def drawn(seed):
    """A small random integer program with one to three cases of zero to three limits, sometimes infeasible."""
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 5, size=random.integers(1, 6))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    whole = random.random() < 0.5  # whole numbers make ties
    numbers = (
        (lambda *shape: random.integers(-3, 6, size=shape).astype(float)) if whole else lambda *s: random.normal(size=s)
    )
    cost = numbers(len(owner))
    cases = []
    for _ in range(random.integers(1, 4)):
        rows = numbers(random.integers(0, 4), len(owner))
        cases.append(Case(rows, np.floor(random.normal(size=len(rows)) * 2 * len(sizes)) + 1e-9))
    return cost, owner, cases


def choices(owner):
    return np.array(list(itertools.product(*(np.flatnonzero(owner == group) for group in range(owner[-1] + 1)))))


def least(cost, owner, cases):
    every = choices(owner)
    met = np.zeros(len(every), bool)
    for case in cases:
        met |= (case.rows[:, every].sum(axis=2) <= case.bounds[:, None]).all(axis=0)
    return cost[every[met]].sum(axis=1).min() if met.any() else np.inf


def run(cost, owner, cases, gap, seconds=60.0):
    def accepts(columns):
        return any((case.rows[:, columns].sum(axis=1) <= case.bounds).all() for case in cases)

    def ceiling_below(value):
        return value - gap * abs(value)

    patience, deadline = time.thread_time() + seconds, time.monotonic() + seconds
    return enumerate_least(cost, owner, cases, accepts, ceiling_below, patience, deadline)


@pytest.mark.parametrize("gap", [0.0, 0.3])
@pytest.mark.parametrize("multipliers", ["few", "many"])
def test_least_of_all_choices(gap, multipliers, monkeypatch):
    if multipliers == "many":
        monkeypatch.setattr(enumeration, "_FEW_CHOICES", 1)
        monkeypatch.setattr(enumeration, "_FIRST_COLUMNS", 2)  # more passes
        monkeypatch.setattr(enumeration, "_LARGEST_ARRAY", 64)  # more than one block of states
    feasible = 0
    for seed in range(100):
        cost, owner, cases = drawn(seed)
        best = least(cost, owner, cases)
        found = run(cost, owner, cases, gap)
        assert found.finished
        if best == np.inf:
            assert found.columns is None and found.bound == np.inf
            continue
        feasible += 1
        assert found.columns is not None and list(owner[found.columns]) == list(range(owner[-1] + 1))
        value = cost[found.columns].sum()
        assert best - 1e-9 <= value and found.bound <= best + 1e-9
        assert value - found.bound <= gap * abs(value) + 1e-9
    assert 50 < feasible < 100


@pytest.mark.parametrize("seed", range(3))
def test_what_highs_finds_where_choices_are_too_many_to_list(seed):
    random = np.random.default_rng(seed)
    groups, options, limits = 10, 12, 3
    owner = np.repeat(np.arange(groups), options)
    cost, rows = random.random(len(owner)), random.random((limits, len(owner)))
    bounds = np.full(limits, 0.35 * groups)
    one_each = LinearConstraint((np.arange(groups)[:, None] == owner).astype(float), 1, 1)
    theirs = milp(
        cost,
        constraints=[one_each, LinearConstraint(rows, ub=bounds)],  # pyright: ignore[reportArgumentType]
        integrality=np.ones(len(owner)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    found = run(cost, owner, [Case(rows, bounds)], 0.0)
    assert found.columns is not None and found.finished
    assert cost[found.columns].sum() == pytest.approx(theirs.fun) == found.bound


def test_a_choice_that_is_not_accepted_is_passed_over():
    cost = np.array([0.0, 1.0, 2.0])
    found = enumerate_least(
        cost, np.zeros(3, int), [Case(np.zeros((0, 3)), np.zeros(0))], lambda c: c[0] == 1, lambda v: v, np.inf, np.inf
    )
    assert found.finished and found.columns is not None and list(found.columns) == [1] and found.bound == 1.0


def test_out_of_time_still_gives_a_true_bound():
    random = np.random.default_rng(0)
    owner = np.repeat(np.arange(20), 30)
    cost, rows = random.random(600), random.random((4, 600))
    case = Case(rows, np.full(4, 20 * 0.35))
    stopped = run(cost, owner, [case], 0.0, seconds=0.0)
    finished = run(cost, owner, [case], 0.05)
    assert stopped.columns is None and not stopped.finished
    assert finished.columns is not None and 0 < stopped.bound <= cost[finished.columns].sum()


def test_bounds_hold_where_numbers_are_large():
    """A ceiling a rounding error above the optimum must not lose it: sums near 1e9 that differ by thousandths."""
    random = np.random.default_rng(1)
    owner = np.repeat(np.arange(4), 5)
    cost = 1e9 + np.round(random.random(20), 3)
    rows = 1e9 + np.round(random.random((2, 20)), 3)
    cases = [Case(rows, np.full(2, 4e9 + 1.5))]
    found = run(cost, owner, cases, 0.0)
    assert found.columns is not None and cost[found.columns].sum() == least(cost, owner, cases)
