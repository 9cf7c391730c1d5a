"""Minimises an integer program by enumeration or, if that finds nothing within a second, by HiGHS.

Enumeration proves the optimum of measured libraries, and of independent numbers, several times faster than HiGHS; if
scores fall as costs grow it finds nothing, and HiGHS is fast (docs/results.md, "Solving").
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import inf, prod

import numpy as np

from puzzle_jax.numeric import Number
from puzzle_jax.program.compile import Compiled, Cut, Model, Point, RowSets
from puzzle_jax.program.enumeration import Found, enumerate_least, relaxed_bound
from puzzle_jax.program.highs import branch_and_cut

# CPU seconds within which enumeration has to find a choice, and the largest share of the time limit for them.
_PATIENCE, _SHARE = 1.0, 0.5
# Enumeration treats combinations of sets of limits one by one; if there are more than this, HiGHS chooses among them.
_MOST_CASES = 4096


def minimise(
    compiled: Compiled,
    objective: np.ndarray,
    rows: Sequence[int],
    cuts: Sequence[Cut],
    time_limit: Number,
    gap: Number,
    row_sets: RowSets = (),
) -> Point:
    """Finds the least objective under some of the limits, disjunctions and cuts, to a relative gap."""
    deadline = time.monotonic() + time_limit
    model = Model.of(compiled, objective, rows, row_sets, cuts, gap)
    found = _enumerate(model, time_limit, deadline)
    if found.bound == inf:
        return Point(None, "infeasible")
    proven = model.objective(found.bound)
    if found.columns is not None:
        return Point(found.columns, "optimal" if found.finished else "time limit", proven)
    return branch_and_cut(model, deadline, proven)


def _enumerate(model: Model, time_limit: Number, deadline: float) -> Found:
    if prod(len(sets) for sets in model.row_sets) > _MOST_CASES:
        return Found(None, -inf, False)
    patience, owner = time.thread_time() + min(_SHARE * time_limit, _PATIENCE), model.compiled.owner
    # The lower bound of a single set of limits holds for every combination that contains it.
    floors: dict[tuple[int, ...], float] = {}
    for rows in [tuple(rows) for sets in model.row_sets for rows in sets] if len(model.row_sets) > 1 else ():
        floors[rows] = relaxed_bound(model.cost, owner, model.case(rows), deadline)
    cases = []
    for selected in product(*model.row_sets):
        floor = max((floors.get(tuple(rows), -inf) for rows in selected), default=-inf)
        if floor < inf:
            cases.append(replace(model.case([row for rows in selected for row in rows]), floor=floor))
    return enumerate_least(
        model.cost,
        owner,
        cases,
        model.accepts,
        model.ceiling_below,
        patience=patience,
        deadline=deadline,
    )
