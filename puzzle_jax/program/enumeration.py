"""Finds the least sum of one column per group under upper limits on other sums, by enumeration between bounds.

    minimise  sum cost[x_g]   subject to   sum rows[r, x_g] <= bounds[r] for each row r of one of several cases

For multipliers u >= 0 every choice that meets the limits costs at least the Lagrangian bound

    L(u) = sum_g min_{a in g} (cost[a] + u . rows[:, a]) - u . bounds

for any u, so it is computed from u directly and does not depend on the tolerances of the solver that gave u (HiGHS: the
duals of the linear relaxation, at which L is greatest). The solver is trusted only if it reports that the relaxation is
infeasible. The reduced cost of a column is its excess over its group's minimum, and a choice costs at least L plus its
reduced costs. For choices below a ceiling, therefore, only columns with reduced cost < ceiling - L need to be
considered, and the ceiling is raised step by step, as in iterative deepening: a pass that finds nothing proves the
ceiling to be a lower bound; one that finds a choice lowers the ceiling to what would be better by more than the gap,
and continues until nothing is left. No incumbent has to be guessed, and the deciding pass is hardly larger than any
proof has to be.

A pass extends partial choices group by group, many at once, depth first and least bound first. It drops those that no
completion brings within the limits, and those whose bound reaches the ceiling under any of a set of multipliers: the
duals of the same program with randomly moved limits, to which each pass adds.

This works for a handful of limits. With many similar groups under many limits, or where the objective falls as the
limited sums grow, so that too many choices are near-optimal, only the time limit ends it, and
`puzzle_jax.program.minimise` continues with HiGHS. Bounds are lowered by more than the rounding of their sums.
Sources: reduced-cost fixing and Lagrangian bounds, Fisher, Management Science 27 (1981); the problem is the
multi-dimensional multiple-choice knapsack.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf, log, nextafter

import numpy as np
from scipy import sparse
from scipy.optimize import OptimizeResult, linprog

# Columns beyond the relaxation's in the first pass, and how their number grows from pass to pass.
_FIRST_COLUMNS, _GROWTH = 16, 1.4
_MULTIPLIERS_PER_PASS, _MOST_MULTIPLIERS = 8, 64
# Fewer choices than this are enumerated in less time than it takes to bound them well.
_FEW_CHOICES = 10_000
# Elements of the largest temporary array: states times options times multipliers.
_LARGEST_ARRAY = 1 << 21
_RELATIVE_ROUNDING = 1e-13


@dataclass(frozen=True)
class Case:
    """One set of limits: rows [limits, columns] and their upper bounds [limits].

    Bounds may be a rounding error too high: the caller checks every choice found. `floor` is a known lower bound on
    the objective of all choices within the limits.
    """

    rows: np.ndarray
    bounds: np.ndarray
    floor: float = -inf


@dataclass(frozen=True)
class Found:
    """A result: the chosen column per group (None: nothing found), a proven lower bound (infinite: there is no choice),
    and whether the search finished, that is, proved the gap."""

    columns: np.ndarray | None
    bound: float
    finished: bool


def enumerate_least(
    cost: np.ndarray,
    owner: np.ndarray,
    cases: Sequence[Case],
    accepts: Callable[[np.ndarray], bool],
    ceiling_below: Callable[[float], float],
    patience: float,
    deadline: float,
) -> Found:
    """Finds the least sum under any of the cases, to a gap.

    Args:
      cost: objective per column; of about the same magnitude as the rows.
      owner: group of each column, ascending from 0.
      accepts: returns whether a choice meets one of the cases exactly; called with the cheapest choices first.
      ceiling_below: maps the objective of a choice to the value that a choice worth having has to be below.
      patience: when to give up while nothing is found, in CPU seconds (`time.thread_time`), so that a busy machine
        finds what an idle one finds.
      deadline: when to give up in any case, on the clock of `time.monotonic`.
    """
    search = _Search(accepts, ceiling_below, patience, deadline)
    waiting = sorted(cases, key=lambda case: case.floor, reverse=True)  # the least floor is taken first
    relaxed: list[_Relaxed] = []

    def relax(below: float) -> None:
        """Relaxes the waiting cases whose floor is below a value."""
        while waiting and waiting[-1].floor < below:
            case = _Relaxed(cost, owner, waiting.pop(), deadline)
            relaxed.extend([case] if case.bound < inf else [])

    while waiting and not relaxed:
        relax(nextafter(waiting[-1].floor, inf))
    relax(min((case.bound for case in relaxed), default=inf))
    if not relaxed:
        return Found(None, inf, True)
    proven = lowest = min(case.bound for case in relaxed)
    reached, random = float(_FIRST_COLUMNS), np.random.default_rng(0)
    while search.columns is None:
        levels = np.sort(np.concatenate([case.bound + case.reduced[case.reduced > 0] for case in relaxed]))
        search.ceiling = max(proven, float(levels[int(reached)])) if reached < len(levels) else inf
        reached *= _GROWTH
        relax(search.ceiling)
        for case in sorted(relaxed, key=lambda case: case.bound):
            if case.bound < search.ceiling and not search.run(case, random):
                return Found(search.columns, proven, False)
        proven = search.ceiling
        if proven == inf:
            break
    return Found(search.columns, max(proven, lowest), True)


def relaxed_bound(cost: np.ndarray, owner: np.ndarray, case: Case, deadline: float) -> float:
    """A lower bound on the cost of every choice within the limits; infinite if there is none."""
    return _Relaxed(cost, owner, case, deadline).bound


class _Relaxed:
    """A case with its linear relaxation's multipliers, bound and reduced costs; the bound is inf if infeasible."""

    def __init__(self, cost: np.ndarray, owner: np.ndarray, case: Case, deadline: float):
        self.cost, self.owner, self.case, self.deadline = cost, owner, case, deadline
        duals = _duals(cost, case.rows, case.bounds, owner, deadline)
        self.bound = inf
        self.multipliers = np.zeros((1, len(case.bounds)))
        if duals is None:
            return
        self.multipliers[0] = duals
        priced = cost + duals @ case.rows
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        minima = np.minimum.reduceat(priced, starts)
        self.reduced = priced - minima[owner]
        largest = np.maximum.reduceat(np.abs(cost) + duals @ np.abs(case.rows), starts)
        rounding = _RELATIVE_ROUNDING * (largest.sum() + duals @ np.abs(case.bounds))
        self.bound = float(minima.sum() - duals @ case.bounds - rounding)

    def add_multipliers(self, kept: np.ndarray, random: np.random.Generator) -> None:
        """Adds duals over the `kept` columns, with the limits moved at random by as much as partial choices vary."""
        rows, owner = self.case.rows[:, kept], self.owner[kept]
        counts = np.bincount(owner)
        few = np.log(counts).sum() < log(_FEW_CHOICES)
        if few or len(self.case.bounds) == 0 or len(self.multipliers) > _MOST_MULTIPLIERS:
            return
        means = np.stack([np.bincount(owner, row) for row in rows]) / counts
        spread = np.sqrt(np.stack([np.bincount(owner, row**2) for row in (rows - means[:, owner])]) / counts)
        scale = np.sqrt((spread**2).sum(axis=1))
        moved = [self.case.bounds + random.normal(size=len(scale)) * scale for _ in range(_MULTIPLIERS_PER_PASS)]
        found = [_duals(self.cost[kept], rows, bounds, owner, self.deadline) for bounds in moved]
        self.multipliers = np.stack([*self.multipliers, *(duals for duals in found if duals is not None)])


def _duals(
    cost: np.ndarray, rows: np.ndarray, bounds: np.ndarray, owner: np.ndarray, deadline: float
) -> np.ndarray | None:
    """The linear relaxation's multipliers of the limits; zeros if it fails or runs out of time, None if infeasible."""
    if not len(bounds):
        return np.zeros(0)
    columns = len(owner)
    one_each = sparse.csr_matrix((np.ones(columns), (owner, np.arange(columns))))
    seconds = min(1e9, max(0.01, deadline - time.monotonic()))
    ones = np.ones(int(owner[-1]) + 1)
    result: OptimizeResult = linprog(
        cost, rows, bounds, one_each, ones, method="highs-ds", options={"time_limit": seconds}
    )
    if result.status == 2:
        return None
    return np.maximum(0.0, -result.ineqlin.marginals) if result.status == 0 else np.zeros(len(bounds))


@dataclass(frozen=True)
class _States:
    """Partial choices of the first `depth` groups of a pass: sums of the objective [states] and of the rows
    [limits, states], bounds [states], and the state of `parent` and the option that each came from."""

    depth: int
    values: np.ndarray
    usage: np.ndarray
    bounds: np.ndarray
    parent: _States | None
    origin: np.ndarray
    option: np.ndarray

    def select(self, where: np.ndarray) -> _States:
        return replace(
            self,
            values=self.values[where],
            usage=self.usage[:, where],
            bounds=self.bounds[where],
            origin=self.origin[where],
            option=self.option[where],
        )

    def path(self, state: int) -> list[int]:
        """Options of a state, first group first."""
        if self.parent is None:
            return []
        return [*self.parent.path(int(self.origin[state])), int(self.option[state])]


@dataclass
class _Search:
    """The best choice so far and the ceiling below which another one would be worth having."""

    accepts: Callable[[np.ndarray], bool]
    ceiling_below: Callable[[float], float]
    patience: float
    deadline: float
    ceiling: float = inf
    columns: np.ndarray | None = None

    def run(self, case: _Relaxed, random: np.random.Generator) -> bool:
        """Searches all choices of a case below the ceiling; returns False if time ran out."""
        kept = np.flatnonzero(case.bound + case.reduced < self.ceiling)
        case.add_multipliers(kept, random)
        options = _in_order(case, kept, self.ceiling - case.bound)
        tails, least = _completions(case, options)
        bounds = case.case.bounds
        none = np.zeros(1, int)
        stack = [_States(0, np.zeros(1), np.zeros((len(bounds), 1)), np.full(1, case.bound), None, none, none)]
        while stack:
            if time.monotonic() > self.deadline or (self.columns is None and time.thread_time() > self.patience):
                return False
            states = stack.pop()
            states = states.select(np.flatnonzero(states.bounds < self.ceiling))
            if not len(states.values):
                continue
            depth = states.depth + 1
            children = _extended(states, case, options[states.depth], least[depth], tails[depth], self.ceiling)
            if depth == len(options):
                self._take(children, case, options)
                continue
            width = len(options[depth]) * len(case.multipliers)
            size = max(1, _LARGEST_ARRAY // width)
            order = np.argsort(-children.bounds, kind="stable")  # what is pushed last is searched first
            edges = range(len(order) % size or size, len(order) + size, size)
            stack += [children.select(order[max(0, end - size) : end]) for end in edges]
        return True

    def _take(self, leaves: _States, case: _Relaxed, options: list[np.ndarray]) -> None:
        """Takes the cheapest complete choice that meets its limits, if there is one."""
        for leaf in np.argsort(leaves.values, kind="stable"):
            if leaves.values[leaf] >= self.ceiling:
                return
            columns = np.array([group[option] for group, option in zip(options, leaves.path(int(leaf)), strict=True)])
            columns = columns[np.argsort(case.owner[columns])]
            if self.accepts(columns):
                self.columns = columns
                self.ceiling = self.ceiling_below(float(leaves.values[leaf]))
                return


def _in_order(case: _Relaxed, kept: np.ndarray, room: float) -> list[np.ndarray]:
    """Columns per group, groups with the fewest cheap ones first, so that partial choices stay few for longer."""
    groups = np.split(kept, np.flatnonzero(np.diff(case.owner[kept])) + 1)
    weights = np.exp(-3 * case.reduced / room) if room < inf else np.ones(len(case.reduced))
    return sorted(groups, key=lambda group: weights[group].sum())


def _completions(case: _Relaxed, options: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The least that the groups from each depth on add: to the bound under each set of multipliers, with the limits'
    own term and less a margin for rounding, [depths, multipliers]; and to each row, [depths, limits]."""
    rows, limits, multipliers = case.case.rows, case.case.bounds, case.multipliers
    tails, least = np.zeros((len(options) + 1, len(multipliers))), np.zeros((len(options) + 1, len(limits)))
    rounding = np.zeros(len(multipliers))
    for depth in range(len(options) - 1, -1, -1):
        cost, used = case.cost[options[depth]], rows[:, options[depth]]
        tails[depth] = tails[depth + 1] + (cost + multipliers @ used).min(axis=1)
        least[depth] = least[depth + 1] + used.min(axis=1)
        rounding += (np.abs(cost) + multipliers @ np.abs(used)).max(axis=1)
    rounding = _RELATIVE_ROUNDING * (rounding + multipliers @ np.abs(limits))
    return tails - multipliers @ limits - rounding, least


def _extended(
    states: _States, case: _Relaxed, columns: np.ndarray, least: np.ndarray, tails: np.ndarray, ceiling: float
) -> _States:
    """Extends all states by each of a group's columns, dropping those that cannot end within limits and ceiling."""
    rows, limits = case.case.rows[:, columns], case.case.bounds
    values = (states.values[:, None] + case.cost[columns]).ravel()
    usage = (states.usage[:, :, None] + rows[:, None, :]).reshape(len(limits), len(values))
    within = np.flatnonzero((usage <= (limits - least)[:, None]).all(axis=0))
    values, usage = values[within], usage[:, within]
    bounds = values + (case.multipliers @ usage + tails[:, None]).max(axis=0)
    below = np.flatnonzero(bounds < ceiling)
    children = within[below]
    return _States(
        depth=states.depth + 1,
        values=values[below],
        usage=usage[:, below],
        bounds=bounds[below],
        parent=states,
        origin=children // len(columns),
        option=children % len(columns),
    )
