"""The mixed-integer program of `puzzle_jax.program.solve` as arrays, and how it is solved.

Within a group, alternatives that others dominate are dropped; group minima are subtracted and rows scaled, so that
tolerances mean the same for bytes and for seconds; a point that comes back is added up again as decimal fractions and
refused if it breaks a limit by however little.

`puzzle_jax.program.enumeration` ends on almost all programs; where it has found nothing in a few seconds, HiGHS has
the rest. There, one of several sets of limits is a binary z for each set, sum z = 1, and row <= bound + M (1 - z) for
each of its limits, with M what the row can exceed its bound by at most.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import inf, prod
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from puzzle_jax.numeric import Number
from puzzle_jax.program.enumeration import Case, Found, enumerate_least, relaxed_bound
from puzzle_jax.program.library import Limit, OneOf, Program, lookup

# HiGHS accepts rows that are broken by 1e-6 and stops at an absolute gap of 1e-6: largest coefficients of
# 1000 turn both into parts in a billion.
_LARGEST_COEFFICIENT = 1e3
_TOLERANCE = 1e-6
_REFUSED_POINTS = 24
# Enumeration takes sets of limits one by one; with more ways to combine them than this, HiGHS chooses among them.
_MOST_CASES = 4096
# In this share of the time, and in so many seconds, enumeration has to find a choice.
_PATIENCE, _MOST_PATIENCE = 0.5, 5.0

Cut = tuple[np.ndarray, int]
"""Columns of which at most so many may be chosen."""


@dataclass(frozen=True)
class Compiled:
    """A program as arrays over columns (alternatives that are not dominated), grouped in order.

    `rows` and `bounds` are those of all limits, in "at most" form. `plain` names the rows that hold in any case,
    `one_ofs` for each `OneOf` the rows of each of its alternatives. `starts` holds each group's first column, `owner`
    each column's group.
    """

    program: Program
    names: list[str]
    alternatives: list[str]
    starts: np.ndarray
    owner: np.ndarray
    score: np.ndarray
    rows: np.ndarray
    bounds: np.ndarray
    plain: list[int]
    one_ofs: list[list[list[int]]]

    def is_met(self, columns: np.ndarray, rows: Sequence[int], one_ofs: Sequence[list[list[int]]]) -> bool:
        """Whether a choice meets some of the rows, and one set of rows of each `one_ofs`, in exact arithmetic."""
        choice, limits = self.choice(columns), self.program.every_limit

        def all_met(rows: Sequence[int]) -> bool:
            return all(limits[row].is_met(self.program.totals(choice, limits[row].key)) for row in rows)

        return all_met(rows) and all(any(all_met(alternative) for alternative in one) for one in one_ofs)

    def choice(self, columns: Sequence[int] | np.ndarray) -> dict[str, str]:
        return {self.names[self.owner[c]]: self.alternatives[c] for c in columns}


def compile_program(program: Program, keep_dominated_by: int) -> Compiled:
    """Drops alternatives with at least `keep_dominated_by` dominators.

    One dominator is reason enough for the first solution. The n-th one may need a dominated alternative to
    keep its distance from the n - 1 before it, but never one with n dominators: at least one of those appears
    in none of the earlier solutions and can take its place.
    """
    limits = program.every_limit
    alternatives: list[str] = []
    blocks: list[np.ndarray] = []
    for options in program.library.values():
        names = list(options)
        values = np.array(
            [
                [
                    float(lookup(options[name], program.minimize)),
                    *(limit.sign * float(lookup(options[name], limit.key)) for limit in limits),
                ]
                for name in names
            ]
        )
        kept = np.flatnonzero(_dominators(values) < keep_dominated_by)
        alternatives += [names[index] for index in kept]
        blocks.append(values[kept])
    sizes = [len(block) for block in blocks]
    table = np.concatenate(blocks)
    plain, one_ofs = _numbered(program.limits)
    return Compiled(
        program=program,
        names=list(program.library),
        alternatives=alternatives,
        starts=np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int),
        owner=np.repeat(np.arange(len(sizes)), sizes),
        score=table[:, 0],
        rows=table[:, 1:].T,
        bounds=np.array([limit.sign * float(limit.bound) for limit in limits]),
        plain=plain,
        one_ofs=one_ofs,
    )


def _numbered(limits: Sequence[Limit | OneOf]) -> tuple[list[int], list[list[list[int]]]]:
    """Places in `every_limit`: of the plain limits, and of each alternative's of each `OneOf`."""
    plain: list[int] = []
    one_ofs: list[list[list[int]]] = []
    at = 0
    for limit in limits:
        if isinstance(limit, Limit):
            plain.append(at)
            at += 1
            continue
        one_ofs.append([])
        for alternative in limit.alternatives.values():
            one_ofs[-1].append(list(range(at, at + len(alternative))))
            at += len(alternative)
    return plain, one_ofs


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
    cuts: Sequence[Cut],
    time_limit: Number,
    gap: Number,
    one_ofs: Sequence[list[list[int]]] = (),
) -> Point:
    """The least objective under some of the limits, `one_ofs` and cuts, to a relative gap."""
    started = time.monotonic()
    model = _Model.of(compiled, objective, rows, one_ofs, cuts, gap)
    found = _enumerate(model, started, time_limit)
    if found.bound == inf:
        return Point(None, "infeasible")
    proven = model.truly(found.bound)
    if found.columns is not None:
        return Point(found.columns, "optimal" if found.finished else "time limit", proven)
    return _branch_and_cut(model, started + time_limit, proven)


@dataclass(frozen=True)
class _Model:
    """What `minimise` minimises, shifted and scaled: true objective = cost * scale + base."""

    compiled: Compiled
    cost: np.ndarray
    base: float
    scale: float
    rows: Sequence[int]
    one_ofs: Sequence[list[list[int]]]
    cuts: Sequence[Cut]
    gap: Number

    @staticmethod
    def of(
        compiled: Compiled,
        objective: np.ndarray,
        rows: Sequence[int],
        one_ofs: Sequence[list[list[int]]],
        cuts: Sequence[Cut],
        gap: Number,
    ) -> _Model:
        reachable = [[alternative for alternative in one if _reachable(compiled, alternative)] for one in one_ofs]
        return _Model(compiled, *_shifted(compiled, objective), rows, reachable, cuts, gap)

    def truly(self, value: float) -> float:
        return value * self.scale + self.base

    def accepts(self, columns: np.ndarray) -> bool:
        return self.compiled.is_met(columns, self.rows, self.one_ofs)

    def ceiling_below(self, value: float) -> float:
        # A hair less than the gap: what is reported must not exceed it by rounding.
        return value - self.gap * (1 - 1e-9) * abs(self.truly(value)) / self.scale

    def row(self, row: int) -> tuple[np.ndarray, float, float]:
        """A limit's coefficients and bound, shifted and scaled, and by how much rounding may have lowered the bound."""
        coefficients, minimum, unit = _shifted(self.compiled, self.compiled.rows[row])
        bound = self.compiled.bounds[row]
        rounding = 1e-13 * (abs(bound) + np.abs(self.compiled.rows[row]).max() * len(self.compiled.names)) / unit
        return coefficients, float((bound - minimum) / unit), float(rounding)

    def case(self, further: Sequence[int]) -> Case:
        """The limits that hold in any case, some more, and the cuts."""
        cut_rows, cut_bounds = self.cut_rows(self.cuts)
        used = [self.row(row) for row in (*self.rows, *further)]
        rows = np.array([row for row, _, _ in used]).reshape(len(used), len(self.cost))
        bounds = [bound + room for _, bound, room in used]
        return Case(np.concatenate([rows, cut_rows]), np.concatenate([bounds, cut_bounds]))

    def cut_rows(self, cuts: Sequence[Cut]) -> tuple[np.ndarray, np.ndarray]:
        matrix = np.zeros((len(cuts), len(self.cost)))
        for line, (columns, _) in zip(matrix, cuts, strict=True):
            line[columns] = 1.0
        return matrix, np.array([float(most) for _, most in cuts])


def _reachable(compiled: Compiled, rows: Sequence[int]) -> bool:
    """Whether each of the rows could be met by itself."""
    return all(compiled.is_met(lowest(compiled, compiled.rows[row]), [row], ()) for row in rows)


def _enumerate(model: _Model, started: float, time_limit: Number) -> Found:
    if prod(len(one) for one in model.one_ofs) > _MOST_CASES:
        return Found(None, -inf, False)
    patience, owner = started + min(_PATIENCE * time_limit, _MOST_PATIENCE), model.compiled.owner
    # What a single set of limits allows bounds every combination that it is part of.
    floors: dict[tuple[int, ...], float] = {}
    for rows in [tuple(rows) for one in model.one_ofs for rows in one] if len(model.one_ofs) > 1 else ():
        floors[rows] = relaxed_bound(model.cost, owner, model.case(rows), patience)
    cases = []
    for picked in product(*model.one_ofs):
        floor = max((floors.get(tuple(rows), -inf) for rows in picked), default=-inf)
        if floor < inf:
            cases.append(replace(model.case([row for rows in picked for row in rows]), floor=floor))
    return enumerate_least(
        model.cost,
        owner,
        cases,
        model.accepts,
        model.ceiling_below,
        patience=patience,
        deadline=started + time_limit,
    )


def _branch_and_cut(model: _Model, deadline: float, proven: float) -> Point:
    """HiGHS, called again while the exact sums refuse its point; `proven` is a bound known before."""
    compiled, columns = model.compiled, len(model.cost)
    sets = [rows for one in model.one_ofs for rows in one]
    groups = np.repeat(np.arange(len(model.one_ofs)), [len(one) for one in model.one_ofs])
    width = columns + len(sets)
    one_each = sparse.block_diag([_one_each(compiled), _membership(groups)]) if sets else _one_each(compiled)
    matrix, uppers, slacks = _limit_rows(model, sets)
    refused = list(model.cuts)
    margin = 0.0
    for attempt in range(_REFUSED_POINTS):
        constraints = [LinearConstraint(one_each, 1, 1)]
        if len(uppers):
            constraints.append(LinearConstraint(matrix, ub=uppers - margin * slacks))  # pyright: ignore[reportArgumentType]
        if refused:
            cuts, most = model.cut_rows(refused)
            cuts = np.pad(cuts, ((0, 0), (0, len(sets))))
            constraints.append(LinearConstraint(cuts, ub=most))  # pyright: ignore[reportArgumentType]
        target = np.concatenate([model.cost, np.zeros(len(sets))])
        result = _call(target, constraints, np.ones(width), deadline, model.gap)
        if result.x is None:
            return Point(None, "time limit" if result.status == 1 else "infeasible")
        chosen = _columns(compiled, result.x)
        if model.accepts(chosen):
            if result.mip_dual_bound is not None:
                proven = max(proven, model.truly(float(result.mip_dual_bound)))
            return Point(chosen, "optimal" if result.status == 0 else "time limit", proven)
        # Within the solver's tolerance of a limit but beyond it: exclude the point, and after many such
        # points stay clear of the tolerance.
        refused.append((chosen, len(compiled.names) - 1))
        if attempt >= _REFUSED_POINTS // 2:
            margin = _TOLERANCE * 2.0 ** (attempt - _REFUSED_POINTS // 2)
    return Point(None, "infeasible")


def _limit_rows(model: _Model, sets: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All limits over columns and sets, their upper bounds, and what the solver's tolerance is relative to in each."""
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
    with _unheard():
        return milp(
            target,
            constraints=constraints,
            integrality=integrality,
            bounds=Bounds(0, np.where(integrality == 1, 1.0, inf)),  # pyright: ignore[reportArgumentType]
            options={"time_limit": max(0.01, deadline - time.monotonic()), "mip_rel_gap": gap},
        )


@contextmanager
def _unheard() -> Iterator[None]:
    """Drops what C code writes to standard output meanwhile: HiGHS has debugging lines that no option turns off, and
    they would stand in the middle of our JSON."""
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


def _one_each(compiled: Compiled) -> sparse.csr_matrix:
    return _membership(compiled.owner)


def _membership(owner: np.ndarray) -> sparse.csr_matrix:
    """1 where a column belongs to a group, [groups, columns]."""
    return sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))))


def _columns(compiled: Compiled, x: np.ndarray) -> np.ndarray:
    return lowest(compiled, -x[: len(compiled.owner)])


def lowest(compiled: Compiled, values: np.ndarray) -> np.ndarray:
    """Each group's column of least value."""
    ends = [*compiled.starts[1:], len(compiled.owner)]
    return np.array([s + int(np.argmin(values[s:e])) for s, e in zip(compiled.starts, ends, strict=True)])
