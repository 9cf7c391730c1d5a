"""Explains why an integer program is infeasible: which limits conflict, and the best value that each could have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, nextafter

import numpy as np

from puzzle_jax.errors import InfeasibleError
from puzzle_jax.numeric import Number, exact, short
from puzzle_jax.program.compile import Compiled, compile_program
from puzzle_jax.program.library import Limit, Program
from puzzle_jax.program.minimise import minimise

# The most combinations of sets of limits that are examined, and that the message describes.
_CASES_EXAMINED, _CASES_EXPLAINED = 24, 8


@dataclass(frozen=True)
class Conflict:
    """A limit that takes part in an infeasibility.

    Attributes:
      alone: the best value that its sum could have without any other limit.
      given_others: the best value under all other limits; None if those conflict without it.
    """

    limit: Limit
    alone: float
    given_others: float | None


class InfeasibleProgram(InfeasibleError):
    """No choice meets all limits; `conflicts` holds those that cannot hold together."""

    def __init__(self, message: str, conflicts: tuple[Conflict, ...]):
        super().__init__(message)
        self.conflicts = conflicts


def explain(program: Program, time_limit: Number) -> InfeasibleProgram:
    """Returns the error for an infeasible program: conflicting limits and the best feasible value of each, for every
    combination of sets of limits, unless the limits that must always hold conflict by themselves."""
    always = compile_program(replace(program, limits=program.plain_limits), keep_dominated_by=1)
    if not program.disjunctions or _infeasible(always, time_limit):
        sentences, conflicts = _conflicts(always, time_limit)
        return InfeasibleProgram("no choice meets the limits: " + "; ".join(sentences), conflicts)
    program = _hopeless(program, time_limit)
    parts: list[str] = []
    found: list[Conflict] = []
    for selected in _spread(program.combinations(), _CASES_EXAMINED):
        limited = replace(program, limits=program.limits_of(selected))
        sentences, conflicts = _conflicts(compile_program(limited, keep_dominated_by=1), time_limit)
        parts.append(", ".join(f"{name} {of_set!r}" for name, of_set in selected.items()) + ": " + "; ".join(sentences))
        found += conflicts
    if len(parts) > _CASES_EXPLAINED:
        parts[_CASES_EXPLAINED:] = [f"and {len(parts) - _CASES_EXPLAINED} more"]
    return InfeasibleProgram("no choice meets the limits with any of " + "; with ".join(parts), tuple(found))


def _infeasible(compiled: Compiled, time_limit: Number, rows: Sequence[int] | None = None) -> bool:
    rows = compiled.plain if rows is None else rows
    point = minimise(compiled, compiled.score, rows, [], time_limit, 1.0, compiled.row_sets)
    return point.status == "infeasible"


def _hopeless(program: Program, time_limit: Number) -> Program:
    """The program with only the first disjunction that cannot be met even alone; unchanged if there is none."""
    for disjunction in program.disjunctions if len(program.disjunctions) > 1 else ():
        alone = replace(program, limits=(*program.plain_limits, disjunction))
        if _infeasible(compile_program(alone, keep_dominated_by=1), time_limit):
            return alone
    return program


def _spread(combinations: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """At most `most` combinations, spread evenly, the first and the last included."""
    step = max(1.0, (len(combinations) - 1) / (most - 1))
    return [combinations[round(number * step)] for number in range(min(len(combinations), most))]


def _conflicts(compiled: Compiled, time_limit: Number) -> tuple[list[str], tuple[Conflict, ...]]:
    """The conflicting limits of a program without disjunctions, as sentences and as conflicts."""
    limits = compiled.program.plain_limits
    everything = range(len(limits))
    alone = [_feasible_value(compiled, row, compiled.lowest(compiled.rows[row])) for row in everything]
    hopeless = [row for row in everything if not limits[row].is_met(exact(alone[row]))]
    involved = hopeless or list(everything)
    if not hopeless:
        for row in everything:  # drop each limit without which the rest still conflict
            rest = [other for other in involved if other != row]
            if rest and _infeasible(compiled, time_limit, rest):
                involved = rest

    def best(row: int) -> float | None:
        """The best value of a limited sum under all other limits; None if those conflict."""
        others = [other for other in everything if other != row]
        point = minimise(compiled, compiled.rows[row], others, [], time_limit, 0.0)
        return None if point.columns is None else _feasible_value(compiled, row, point.columns)

    conflicts = tuple(Conflict(limits[row], alone[row], best(row)) for row in involved)
    sentences = []
    if hopeless:
        for conflict in conflicts:
            best_possible = short(conflict.alone, conflict.limit.sign)
            sentences.append(f"{conflict.limit} cannot be met: the best possible value is {best_possible}")
    else:
        sentences.append(f"{' and '.join(str(conflict.limit) for conflict in conflicts)} cannot hold together")
    for conflict in conflicts:
        if conflict.given_others is not None and not (hopeless and conflict.given_others == conflict.alone):
            best_possible = short(conflict.given_others, conflict.limit.sign)
            sentences.append(f"with the other limits kept, {conflict.limit.key!r} can be {best_possible}")
    return sentences, conflicts


def _feasible_value(compiled: Compiled, row: int, columns: np.ndarray) -> float:
    """The sum of a limited key over a choice, rounded such that the choice meets it as a limit."""
    limit = compiled.program.plain_limits[row]
    total = compiled.program.totals(compiled.choice(columns), limit.key)
    value = float(total)
    if limit.sign * total > limit.sign * exact(value):
        value = nextafter(value, limit.sign * inf)
    return value
