"""Solves integer programs with HiGHS (scipy.optimize.milp).

A disjunction is a binary z for each of its sets of limits, sum z = 1, and row <= bound + M (1 - z) for each limit of
the set, with M the most that the row can exceed its bound by. In an elastic solve every limit may be violated, at a
price.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from puzzle_jax.numeric import Number
from puzzle_jax.program.compile import LARGEST_COEFFICIENT, Compiled, Model, Point

_TOLERANCE = 1e-6  # by which HiGHS lets rows be violated
_REFUSED_POINTS = 24


def branch_and_cut(model: Model, deadline: float, proven: float = -inf) -> Point:
    """Finds the least objective of a model; HiGHS is called again as long as exact sums reject its point.

    `deadline` is on the clock of `time.monotonic`; `proven` is a lower bound that is already known.
    """
    compiled = model.compiled
    sets = [rows for each in model.row_sets for rows in each]
    groups = np.repeat(np.arange(len(model.row_sets)), [len(each) for each in model.row_sets])
    one_each = _membership(compiled.owner)
    if sets:
        one_each = sparse.block_diag([one_each, _membership(groups)])
    matrix, uppers, slacks = _limit_rows(model, sets)
    target = np.concatenate([model.cost, np.zeros(len(sets))])
    refused, margin = list(model.cuts), 0.0
    for attempt in range(_REFUSED_POINTS):
        constraints = [LinearConstraint(one_each, 1, 1)]
        if len(uppers):
            constraints.append(LinearConstraint(matrix, ub=uppers - margin * slacks))  # pyright: ignore[reportArgumentType]
        if refused:
            cuts, most = model.cut_rows(refused)
            cuts = np.pad(cuts, ((0, 0), (0, len(sets))))
            constraints.append(LinearConstraint(cuts, ub=most))  # pyright: ignore[reportArgumentType]
        result = _call(target, constraints, np.ones(len(target)), deadline, model.gap)
        if result.x is None:
            return Point(None, "time limit" if result.status == 1 else "infeasible", proven)
        chosen = _columns(compiled, result.x)
        if model.accepts(chosen):
            if result.mip_dual_bound is not None:
                proven = max(proven, model.objective(float(result.mip_dual_bound)))
            return Point(chosen, "optimal" if result.status == 0 else "time limit", proven)
        # The point violates a limit, though within the solver's tolerance: exclude it, and after many such points
        # tighten the limits.
        refused.append((chosen, len(compiled.names) - 1))
        if attempt >= _REFUSED_POINTS // 2:
            margin = _TOLERANCE * 2.0 ** (attempt - _REFUSED_POINTS // 2)
    return Point(None, "infeasible", proven)


def least_excess(compiled: Compiled, time_limit: Number, within: float | None = None) -> Point:
    """The elastic solve: the least summed relative excess over the limits, or the best score `within` an excess."""
    deadline = time.monotonic() + time_limit
    columns, count = len(compiled.owner), len(compiled.rows)
    cost, _, _ = compiled.scaled(compiled.score)
    scaled = [compiled.scaled(row) for row in compiled.rows]
    units = np.array([unit for _, _, unit in scaled])
    uppers = (compiled.bounds - np.array([minimum for _, minimum, _ in scaled])) / units
    price = np.concatenate([np.zeros(columns), units / _denominators(compiled)])
    matrix = np.concatenate([np.stack([coefficients for coefficients, _, _ in scaled]), -np.eye(count)], axis=1)
    one_each = sparse.hstack([_membership(compiled.owner), sparse.csr_matrix((len(compiled.names), count))])
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints.append(LinearConstraint(matrix, ub=uppers))  # pyright: ignore[reportArgumentType]
    target = price * (LARGEST_COEFFICIENT / price.max())
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


def _limit_rows(model: Model, sets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All limits over columns and sets, their upper bounds, and the scale of the solver's tolerance in each."""
    lines, uppers, slacks = [], [], []
    for z, rows in [(None, model.rows), *enumerate(sets)]:
        for row in rows:
            coefficients, upper, _ = model.row(row)
            switch, most = np.zeros(len(sets)), 0.0
            if z is not None:
                largest = np.maximum.reduceat(coefficients, model.compiled.starts).sum()
                switch[z] = most = max(0.0, float(largest) - upper)
            lines.append(np.concatenate([coefficients, switch]))
            uppers.append(upper + most)
            slacks.append(1.0 + most)
    return np.array(lines), np.array(uppers), np.array(slacks)


def _denominators(compiled: Compiled) -> np.ndarray:
    """The size that each excess is relative to: the limit or, if that is 0, the row's largest difference."""
    units = np.array([compiled.scaled(row)[2] * LARGEST_COEFFICIENT for row in compiled.rows])
    return np.where(compiled.bounds == 0, units, np.abs(compiled.bounds))


def _call(
    target: np.ndarray,
    constraints: list[LinearConstraint],
    integrality: np.ndarray,
    deadline: float,
    gap: Number,
) -> OptimizeResult:
    """Calls HiGHS; columns that are not integral are slacks without an upper bound."""
    with _silenced():
        return milp(
            target,
            constraints=constraints,
            integrality=integrality,
            bounds=Bounds(0, np.where(integrality == 1, 1.0, inf)),  # pyright: ignore[reportArgumentType]
            options={"time_limit": max(0.01, deadline - time.monotonic()), "mip_rel_gap": gap},
        )


@contextmanager
def _silenced() -> Iterator[None]:
    """Discards what C code writes to standard output: HiGHS prints debugging lines that no option turns off, and that
    would end up in the middle of our JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _membership(owner: np.ndarray) -> sparse.csr_matrix:
    """Matrix [groups, columns] that is 1 where a column belongs to a group."""
    return sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))


def _columns(compiled: Compiled, x: np.ndarray) -> np.ndarray:
    return compiled.lowest(-x[: len(compiled.owner)])
