"""An integer program (`program.library`) as arrays over columns, one for every alternative worth keeping.

Within a group, alternatives that others dominate are dropped. A `Model` is what one solver call minimises: group
minima are subtracted and rows scaled, so that tolerances mean the same for bytes and for seconds; a point that the
solver returns is summed again as decimal fractions and rejected if it violates a limit at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from math import inf

import numpy as np

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.numeric import Number
from puzzle_jax.program.enumeration import Case
from puzzle_jax.program.library import Limit, Program, lookup

LARGEST_COEFFICIENT = 1e3
"""HiGHS accepts rows that are violated by 1e-6 and stops at an absolute gap of 1e-6: with largest coefficients of 1000
both are parts in a billion."""

Cut = tuple[np.ndarray, int]
"""Columns, and the most of them that may be chosen."""

RowSets = Sequence[Sequence[Sequence[int]]]
"""For every disjunction its sets of rows, one of which has to hold."""


@dataclass(frozen=True)
class Compiled:
    """A program as arrays over columns (alternatives that are not dominated), grouped in order.

    Attributes:
      names: names of the groups.
      alternatives: name of each column.
      starts: first column of each group.
      owner: group of each column.
      rows, bounds: all limits in "at most" form, [limits, columns] and [limits].
      plain: rows that must always hold.
      row_sets: for each disjunction, the rows of each of its sets of limits.
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
    row_sets: list[list[list[int]]]

    def is_met(self, columns: np.ndarray, rows: Sequence[int], row_sets: RowSets) -> bool:
        """Returns whether a choice meets some rows and one set of rows of each disjunction, in exact arithmetic."""
        choice, limits = self.choice(columns), self.program.all_limits

        def all_met(rows: Sequence[int]) -> bool:
            return all(limits[row].is_met(self.program.totals(choice, limits[row].key)) for row in rows)

        return all_met(rows) and all(any(all_met(rows) for rows in sets) for sets in row_sets)

    def choice(self, columns: Sequence[int] | np.ndarray) -> dict[str, str]:
        return {self.names[self.owner[c]]: self.alternatives[c] for c in columns}

    def lowest(self, values: np.ndarray) -> np.ndarray:
        """Each group's column of least value."""
        ends = [*self.starts[1:], len(self.owner)]
        return np.array([s + int(np.argmin(values[s:e])) for s, e in zip(self.starts, ends, strict=True)])

    def scaled(self, values: np.ndarray) -> tuple[np.ndarray, float, float]:
        """Values less their group's minimum and divided by a unit; the sum of the minima; the unit."""
        minima = np.minimum.reduceat(values, self.starts)
        shifted = values - minima[self.owner]
        unit = float(shifted.max()) / LARGEST_COEFFICIENT or 1.0
        return shifted / unit, float(minima.sum()), unit


def compile_program(
    program: Program, keep_dominated_by: int, classes: Mapping[str, Mapping[str, Hashable]] | None = None
) -> Compiled:
    """Drops alternatives with at least `keep_dominated_by` dominators.

    For the first solution one dominator suffices. The n-th one may need a dominated alternative to keep its distance
    from the n - 1 before it, but never one with n dominators: at least one of those appears in none of the earlier
    solutions and can take its place. Where alternatives have `classes`, only dominators of the same class count.

    Raises `PuzzleError` where `classes` names an unknown group, or lacks an alternative of one that it names.
    """
    limits = program.all_limits
    alternatives: list[str] = []
    blocks: list[np.ndarray] = []
    classes = classes or {}
    _check_classes(program, classes)
    for group, options in program.library.items():
        names, own = list(options), classes.get(group, {})
        keys = [(program.minimize, 1), *((limit.key, limit.sign) for limit in limits)]
        values = np.array([[sign * float(lookup(options[name], key)) for key, sign in keys] for name in names])
        kept = np.flatnonzero(_dominators(values, [own.get(name) for name in names]) < keep_dominated_by)
        alternatives += [names[index] for index in kept]
        blocks.append(values[kept])
    sizes = [len(block) for block in blocks]
    table = np.concatenate(blocks)
    plain, row_sets = _places(program)
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
        row_sets=row_sets,
    )


def _places(program: Program) -> tuple[list[int], list[list[list[int]]]]:
    """Indices into `all_limits`: those of the plain limits, and those of each set of each disjunction."""
    plain: list[int] = []
    row_sets: list[list[list[int]]] = []
    places = count()
    for limit in program.limits:
        if isinstance(limit, Limit):
            plain.append(next(places))
        else:
            row_sets.append([[next(places) for _ in limits] for limits in limit.sets.values()])
    return plain, row_sets


def _check_classes(program: Program, classes: Mapping[str, Mapping[str, Hashable]]) -> None:
    for group, own in classes.items():
        missing = [name for name in program.library.get(group, ()) if name not in own]
        if missing or group not in program.library:
            what = f"lack {shown(missing[0])}" if missing else "are given, but the library has no such group"
            raise PuzzleError(f"classes of group {shown(group)} {what}")


def _dominators(values: np.ndarray, classes: Sequence[Hashable]) -> np.ndarray:
    """For each row, the number of others of its class that are nowhere larger; of equal rows the first dominates."""
    order = np.arange(len(values))

    def dominators(index: int, row: np.ndarray) -> int:
        alike = np.array([other == classes[index] for other in classes])
        better = alike & (np.any(values < row, axis=1) | (order < index))
        return int(np.sum(np.all(values <= row, axis=1) & better))

    return np.array([dominators(index, row) for index, row in enumerate(values)])


@dataclass(frozen=True)
class Point:
    """A solver's answer: chosen columns (None: no point), status, proven bound, summed excess over the limits."""

    columns: np.ndarray | None
    status: str
    bound: float = -inf
    excess: float | None = None


@dataclass(frozen=True)
class Model:
    """One call's integer program, shifted and scaled: objective = cost * unit + base, under some limits and cuts."""

    compiled: Compiled
    cost: np.ndarray
    base: float
    unit: float
    rows: Sequence[int]
    row_sets: RowSets
    cuts: Sequence[Cut]
    gap: Number

    @staticmethod
    def of(
        compiled: Compiled,
        objective: np.ndarray,
        rows: Sequence[int],
        row_sets: RowSets,
        cuts: Sequence[Cut],
        gap: Number,
    ) -> Model:
        """Builds the model, leaving out sets that have a row which cannot be met even by itself."""

        def reachable(rows: Sequence[int]) -> bool:
            return all(compiled.is_met(compiled.lowest(compiled.rows[row]), [row], ()) for row in rows)

        possible = [[rows for rows in sets if reachable(rows)] for sets in row_sets]
        return Model(compiled, *compiled.scaled(objective), rows, possible, cuts, gap)

    def objective(self, value: float) -> float:
        """The true objective for a scaled value."""
        return value * self.unit + self.base

    def accepts(self, columns: np.ndarray) -> bool:
        return self.compiled.is_met(columns, self.rows, self.row_sets)

    def ceiling_below(self, value: float) -> float:
        # Slightly less than the gap, so that rounding cannot make the reported gap exceed it.
        return value - self.gap * (1 - 1e-9) * abs(self.objective(value)) / self.unit

    def row(self, row: int) -> tuple[np.ndarray, float, float]:
        """A limit's coefficients and bound, shifted and scaled, and by how much rounding may have lowered the bound."""
        values, bound = self.compiled.rows[row], self.compiled.bounds[row]
        coefficients, minimum, unit = self.compiled.scaled(values)
        rounding = 1e-13 * (abs(bound) + np.abs(values).max() * len(self.compiled.names)) / unit
        return coefficients, float((bound - minimum) / unit), float(rounding)

    def case(self, further: Sequence[int]) -> Case:
        """The limits that must always hold, the `further` ones, and the cuts."""
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
