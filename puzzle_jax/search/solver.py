"""The mixed-integer program of `puzzle_jax.search.program` as arrays, and the calls of HiGHS on it.

Within a group, alternatives that others dominate are dropped; group minima are subtracted and rows scaled, so
that the solver's tolerances mean the same for bytes and for seconds; a point that comes back is added up
again as decimal fractions and refused if it breaks a limit by however little.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from puzzle_jax.search.library import Number, Program, lookup

# HiGHS accepts rows that are broken by 1e-6 and stops at an absolute gap of 1e-6: largest coefficients of
# 1000 turn both into parts in a billion.
_LARGEST_COEFFICIENT = 1e3
_TOLERANCE = 1e-6
_REFUSED_POINTS = 24


@dataclass(frozen=True)
class Compiled:
    """A program as arrays over columns (alternatives that are not dominated), grouped in order.

    `rows` and `bounds` are in "at most" form. `starts` holds each group's first column, `owner` each column's
    group.
    """

    program: Program
    names: list[str]
    alternatives: list[str]
    starts: np.ndarray
    owner: np.ndarray
    score: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray

    def choice(self, columns: Sequence[int] | np.ndarray) -> dict[str, str]:
        return {self.names[self.owner[c]]: self.alternatives[c] for c in columns}


def compile_program(program: Program, keep_dominated_by: int) -> Compiled:
    """Drops alternatives with at least `keep_dominated_by` dominators.

    One dominator is reason enough for the first solution. The n-th one may need a dominated alternative to
    keep its distance from the n - 1 before it, but never one with n dominators: at least one of those appears
    in none of the earlier solutions and can take its place.
    """
    alternatives: list[str] = []
    blocks: list[np.ndarray] = []
    for options in program.library.values():
        names = list(options)
        values = np.array(
            [
                [
                    float(lookup(options[name], program.minimize)),
                    *(limit.sign * float(lookup(options[name], limit.key)) for limit in program.limits),
                ]
                for name in names
            ]
        )
        kept = np.flatnonzero(_dominators(values) < keep_dominated_by)
        alternatives += [names[index] for index in kept]
        blocks.append(values[kept])
    sizes = [len(block) for block in blocks]
    table = np.concatenate(blocks)
    return Compiled(
        program=program,
        names=list(program.library),
        alternatives=alternatives,
        starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int),
        owner=np.repeat(np.arange(len(sizes)), sizes),
        score=table[:, 0],
        rows=table[:, 1:].T,
        bounds=np.array([limit.sign * float(limit.bound) for limit in program.limits]),
    )


def _dominators(values: np.ndarray) -> np.ndarray:
    """For each row, how many others are at most as large everywhere; of equal rows the first dominates."""
    counts = np.zeros(len(values), int)
    order = np.arange(len(values))
    for index, row in enumerate(values):
        no_worse = np.all(values <= row, axis=1)
        better = np.any(values < row, axis=1) | (order < index)
        counts[index] = np.sum(no_worse & better)
    return counts


@dataclass(frozen=True)
class Point:
    """What the solver returned: chosen columns (None: no point), status, proven bound, summed excess."""

    columns: np.ndarray | None
    status: str
    bound: float = -inf
    excess: float | None = None


def _shifted(compiled: Compiled, values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Values less their group's minimum and over a scale; the sum of the minima; the scale."""
    minima = np.minimum.reduceat(values, compiled.starts)
    shifted = values - minima[compiled.owner]
    scale = float(shifted.max()) / _LARGEST_COEFFICIENT or 1.0
    return shifted / scale, float(minima.sum()), scale


def minimise(
    compiled: Compiled,
    objective: np.ndarray,
    rows: Sequence[int],
    cuts: list[tuple[np.ndarray, int]],
    time_limit: Number,
    gap: Number,
) -> Point:
    """The least objective under some of the limits, solved again while the exact sums refuse the point."""
    deadline = time.monotonic() + time_limit
    columns = len(compiled.owner)
    cost, base, scale = _shifted(compiled, objective)
    scaled = [_shifted(compiled, compiled.rows[row]) for row in rows]
    uppers = np.array(
        [(compiled.bounds[row] - minimum) / unit for row, (_, minimum, unit) in zip(rows, scaled, strict=True)]
    )
    limits = [compiled.program.limits[row] for row in rows]
    refused = list(cuts)
    margin = 0.0
    for attempt in range(_REFUSED_POINTS):
        constraints = [LinearConstraint(_one_each(compiled), 1, 1)]
        if limits:
            matrix = np.stack([coefficients for coefficients, _, _ in scaled])
            constraints.append(LinearConstraint(matrix, ub=uppers - margin))  # pyright: ignore[reportArgumentType]
        constraints += [_cut(columns, chosen, most) for chosen, most in refused]
        result = _call(cost, constraints, np.ones(columns), deadline, gap)
        if result.x is None:
            return Point(None, "time limit" if result.status == 1 else "infeasible")
        chosen = _columns(compiled, result.x)
        choice = compiled.choice(chosen)
        if all(limit.is_met(compiled.program.totals(choice, limit.key)) for limit in limits):
            proven = -inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * scale + base
            return Point(chosen, "optimal" if result.status == 0 else "time limit", proven)
        # Within the solver's tolerance of a limit but beyond it: exclude the point, and after many such
        # points stay clear of the tolerance.
        refused.append((chosen, len(compiled.names) - 1))
        if attempt >= _REFUSED_POINTS // 2:
            margin = _TOLERANCE * 2.0 ** (attempt - _REFUSED_POINTS // 2)
    return Point(None, "infeasible")


def least_excess(compiled: Compiled, time_limit: Number, within: float | None = None) -> Point:
    """Limits may be broken: the least summed relative excess, or the best score `within` a given excess."""
    deadline = time.monotonic() + time_limit
    columns, count = len(compiled.owner), len(compiled.rows)
    cost, _, _ = _shifted(compiled, compiled.score)
    scaled = [_shifted(compiled, row) for row in compiled.rows]
    units = np.array([unit for _, _, unit in scaled])
    uppers = (compiled.bounds - np.array([minimum for _, minimum, _ in scaled])) / units
    price = np.concatenate([np.zeros(columns), units / _denominators(compiled)])
    matrix = np.concatenate([np.stack([coefficients for coefficients, _, _ in scaled]), -np.eye(count)], axis=1)
    one_each = sparse.hstack([_one_each(compiled), sparse.csr_matrix((len(compiled.names), count))])
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints.append(LinearConstraint(matrix, ub=uppers))  # pyright: ignore[reportArgumentType]
    target = price * (_LARGEST_COEFFICIENT / price.max())
    if within is not None:
        constraints.append(LinearConstraint(price[None], -inf, within * (1 + 1e-6) + 1e-9))
        target = np.concatenate([cost, np.zeros(count)])
    integrality = np.concatenate([np.ones(columns), np.zeros(count)])
    result = _call(target, constraints, integrality, deadline, 1e-6)
    if result.x is None:
        return Point(None, "time limit" if result.status == 1 else "infeasible")
    chosen = _columns(compiled, result.x)
    over = np.maximum(compiled.rows[:, chosen].sum(axis=1) - compiled.bounds, 0.0)
    excess = float((over / _denominators(compiled)).sum())
    return Point(chosen, "optimal" if result.status == 0 else "time limit", excess=excess)


def _denominators(compiled: Compiled) -> np.ndarray:
    """What an excess is relative to: the limit, or where that is 0 the row's largest difference."""
    units = np.array([_shifted(compiled, row)[2] * _LARGEST_COEFFICIENT for row in compiled.rows])
    return np.where(compiled.bounds == 0, units, np.abs(compiled.bounds))


def _call(
    target: np.ndarray,
    constraints: list[LinearConstraint],
    integrality: np.ndarray,
    deadline: float,
    gap: Number,
) -> Any:
    """HiGHS; columns that are not integral are slacks without upper bound."""
    return milp(
        target,
        constraints=constraints,
        integrality=integrality,
        bounds=Bounds(0, np.where(integrality == 1, 1.0, inf)),  # pyright: ignore[reportArgumentType]
        options={"time_limit": max(0.01, deadline - time.monotonic()), "mip_rel_gap": gap},
    )


def _one_each(compiled: Compiled) -> sparse.csr_matrix:
    columns = len(compiled.owner)
    return sparse.csr_matrix((np.ones(columns), (compiled.owner, np.arange(columns))))


def _cut(width: int, chosen: np.ndarray, most: int) -> LinearConstraint:
    row = np.zeros(width)
    row[chosen] = 1.0
    return LinearConstraint(row[None], -inf, most)


def _columns(compiled: Compiled, x: np.ndarray) -> np.ndarray:
    return lowest(compiled, -x[: len(compiled.owner)])


def lowest(compiled: Compiled, values: np.ndarray) -> np.ndarray:
    """Each group's column of least value."""
    ends = [*compiled.starts[1:], len(compiled.owner)]
    return np.array([s + int(np.argmin(values[s:e])) for s, e in zip(compiled.starts, ends, strict=True)])
