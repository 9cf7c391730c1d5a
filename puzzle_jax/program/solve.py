"""The choice of one alternative per group as a mixed-integer program.

    minimise  sum score[g, a] x[g, a]   subject to   sum_a x[g, a] = 1 for each group g,   x binary,
              sum cost[g, a] x[g, a] <= limit (or >=) for each limit, and for those of one alternative of each `OneOf`,
              and for further solutions  sum x * x_previous <= groups - min_distance

(Puzzle, arXiv 2411.19146, section 4.) A group is whatever one thing must be chosen for: a layer, or one
sub-block of a layer, so that sub-blocks whose scores and costs add need no product of alternatives. The
library that a program works on is {group: {alternative: {nested numbers}}}, its numbers named by dotted keys
("stats.runtime_ms"); nothing here knows what a model is. A cost that every choice shares is a group with one
alternative.

How it is solved: `puzzle_jax.program.compile`. Every solution is added up again as decimal fractions, as written in the
library, and refused if a limit is broken by however little. An infeasible program raises with the limits that clash
and the nearest value that each could have.

Left out: products of variables (interactions between groups).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf, nextafter
from typing import Any

import numpy as np

from puzzle_jax.errors import InfeasibleError, PuzzleError
from puzzle_jax.numeric import Number, exact, short
from puzzle_jax.program.compile import Compiled, Point, compile_program, least_excess, lowest, minimise
from puzzle_jax.program.library import Library, Limit, OneOf, Program, Solution

__all__ = [
    "Clash",
    "InfeasibleProgram",
    "Library",
    "Limit",
    "OneOf",
    "Program",
    "Solution",
    "assess",
    "nearest",
    "solve",
]


# Ways to pick sets of limits that are looked into where a program is infeasible, and that its message goes through.
_CASES_EXAMINED, _CASES_EXPLAINED = 24, 8
_MOST_SOLUTIONS = 10_000


@dataclass(frozen=True)
class Clash:
    """A limit that takes part in an infeasibility: the best value it could have with no other limit, and
    beside all others (None: the others clash without it)."""

    limit: Limit
    alone: float
    given_others: float | None


class InfeasibleProgram(InfeasibleError):
    """No choice meets all limits; `clashes` holds those that cannot hold together."""

    def __init__(self, message: str, clashes: tuple[Clash, ...]):
        super().__init__(message)
        self.clashes = clashes


def solve(
    program: Program,
    *,
    num_solutions: int = 1,
    min_distance: int = 1,
    time_limit: Number = 30.0,
    gap: Number = 1e-4,
) -> list[Solution]:
    """The best choices, best first; fewer than asked for when no more exist at that distance.

    Args:
      program: library, objective and limits.
      num_solutions: size of the pool.
      min_distance: groups in which any two solutions differ at least.
      time_limit: seconds for each solution; a feasible point found by then is accepted.
      gap: relative gap that counts as optimal; with a gap, "best first" holds to that gap.

    Raises:
      InfeasibleProgram: no choice meets the limits; names those that clash and the nearest feasible values.
      PuzzleError: a setting is impossible, or the time limit passed with no feasible point.
    """
    _require("num_solutions", num_solutions, int, num_solutions >= 1, "at least 1")
    _require("num_solutions", num_solutions, int, num_solutions <= _MOST_SOLUTIONS, f"at most {_MOST_SOLUTIONS}")
    _require("min_distance", min_distance, int, min_distance >= 1, "at least 1")
    _require("time_limit", time_limit, (int, float), 0 < time_limit < inf, "a finite number above 0 seconds")
    _require("gap", gap, (int, float), 0 <= gap < inf, "at least 0")
    compiled = compile_program(program, keep_dominated_by=num_solutions)
    found: list[np.ndarray] = []
    solutions: list[Solution] = []
    while len(solutions) < num_solutions:
        cuts = [(columns, len(compiled.names) - min_distance) for columns in found]
        point = minimise(compiled, compiled.score, compiled.plain, cuts, time_limit, gap, compiled.one_ofs)
        if point.columns is None and not solutions:
            if point.status == "infeasible":
                raise _explain(program, time_limit)
            raise PuzzleError(f"no feasible choice was found in {time_limit:g} s; raise the time limit")
        if point.columns is None:
            break
        found.append(point.columns)
        solutions.append(_solution(compiled, point))
    return sorted(solutions, key=lambda solution: solution.score)


def nearest(program: Program, *, time_limit: Number = 30.0) -> Solution:
    """The choice that breaks the limits least, by summed relative excess, and scores best among those.

    Where the limits can be met this is `solve`'s first solution. `missed` names the limits that stay broken.
    """
    compiled = compile_program(program, keep_dominated_by=1)
    point = minimise(compiled, compiled.score, compiled.plain, [], time_limit, 1e-4, compiled.one_ofs)
    if point.columns is not None:
        return _solution(compiled, point)
    found = [_least_broken(program, picked, time_limit) for picked in program.cases()]
    return min(found, key=lambda pair: (round(pair[0], 9), pair[1].score))[1]


def _least_broken(program: Program, picked: dict[str, str], time_limit: Number) -> tuple[float, Solution]:
    """The least summed relative excess over the limits that hold with some picks, and the best choice that has it."""
    compiled = compile_program(replace(program, limits=program.limits_of(picked)), keep_dominated_by=1)
    least = least_excess(compiled, time_limit)
    if least.columns is None or least.excess is None:
        raise PuzzleError(f"no choice was found in {time_limit:g} s; raise the time limit")
    best = least_excess(compiled, time_limit, within=least.excess)
    columns = least.columns if best.columns is None else best.columns
    choice = compiled.choice(columns)
    return least.excess, _describe(program, choice, best.status, None, picked)


def assess(program: Program, choice: Mapping[str, str]) -> Solution:
    """A given choice with its totals and the limits it breaks.

    Raises `PuzzleError` if it is no choice of the library.
    """
    for group, alternatives in program.library.items():
        if choice.get(group) not in alternatives:
            raise PuzzleError(f"the choice has {choice.get(group)!r} for group {group!r}, which is no alternative")
    return _describe(program, {group: choice[group] for group in program.library}, "given", None)


def _solution(compiled: Compiled, point: Point) -> Solution:
    assert point.columns is not None
    choice = compiled.choice(point.columns)
    score = float(compiled.program.totals(choice, compiled.program.minimize))
    gap = None
    if point.bound > -inf:
        behind = max(0.0, score - point.bound)
        gap = behind / abs(score) if score else behind
    return _describe(compiled.program, choice, point.status, gap)


def _describe(
    program: Program, choice: dict[str, str], status: str, gap: float | None, picked: dict[str, str] | None = None
) -> Solution:
    costs = {key: float(program.totals(choice, key)) for key in program.keys}
    picked = program.pick(choice) if picked is None else picked
    limits = program.limits_of(picked)
    missed = tuple(limit for limit in limits if not limit.is_met(program.totals(choice, limit.key)))
    return Solution(choice, float(program.totals(choice, program.minimize)), costs, status, gap, missed, picked)


def _explain(program: Program, time_limit: Number) -> InfeasibleProgram:
    """Which limits clash, and the nearest feasible value of each; for every way to pick sets of limits, unless the
    limits that always hold clash by themselves."""
    always = compile_program(replace(program, limits=program.plain_limits), keep_dominated_by=1)
    if not program.one_ofs or minimise(always, always.score, always.plain, [], time_limit, 1.0).status == "infeasible":
        sentences, clashes = _clashes(always, time_limit)
        return InfeasibleProgram("no choice meets the limits: " + "; ".join(sentences), clashes)
    program = _hopeless(program, time_limit)
    cases = _spread(program.cases(), _CASES_EXAMINED)
    parts: list[str] = []
    every: list[Clash] = []
    for picked in cases:
        sentences, clashes = _clashes(
            compile_program(replace(program, limits=program.limits_of(picked)), keep_dominated_by=1), time_limit
        )
        parts.append(", ".join(f"{name} {pick!r}" for name, pick in picked.items()) + ": " + "; ".join(sentences))
        every += clashes
    if len(parts) > _CASES_EXPLAINED:
        parts[_CASES_EXPLAINED:] = [f"and {len(parts) - _CASES_EXPLAINED} more"]
    return InfeasibleProgram("no choice meets the limits with any of " + "; with ".join(parts), tuple(every))


def _hopeless(program: Program, time_limit: Number) -> Program:
    """The program with the first `OneOf` alone that nothing meets by itself; where there is none, as it is."""
    for one in program.one_ofs if len(program.one_ofs) > 1 else ():
        alone = replace(program, limits=(*program.plain_limits, one))
        compiled = compile_program(alone, keep_dominated_by=1)
        point = minimise(compiled, compiled.score, compiled.plain, [], time_limit, 1.0, compiled.one_ofs)
        if point.status == "infeasible":
            return alone
    return program


def _spread(cases: list[dict[str, str]], most: int) -> list[dict[str, str]]:
    """At most so many, evenly over all, the first and the last among them."""
    step = max(1.0, (len(cases) - 1) / (most - 1))
    return [cases[round(number * step)] for number in range(min(len(cases), most))]


def _clashes(compiled: Compiled, time_limit: Number) -> tuple[list[str], tuple[Clash, ...]]:
    """Which limits of a program without `OneOf` clash, in words and as they are."""
    limits = compiled.program.plain_limits
    everything = range(len(limits))
    alone = [_feasible_value(compiled, r, lowest(compiled, compiled.rows[r])) for r in everything]
    hopeless = [r for r in everything if not limits[r].is_met(exact(alone[r]))]
    clashing = hopeless or list(everything)
    if not hopeless:
        for row in everything:  # drop each limit without which the rest still clash
            rest = [other for other in clashing if other != row]
            if rest and minimise(compiled, compiled.score, rest, [], time_limit, 1.0).status == "infeasible":
                clashing = rest
    clashes = tuple(
        Clash(limits[r], alone[r], _best(compiled, r, [o for o in everything if o != r], time_limit)) for r in clashing
    )
    sentences = []
    if hopeless:
        for clash in clashes:
            sentences.append(
                f"{clash.limit} cannot be met: the nearest possible is {short(clash.alone, clash.limit.sign)}"
            )
    else:
        names = " and ".join(str(clash.limit) for clash in clashes)
        sentences.append(f"{names} cannot hold together")
    for clash in clashes:
        if clash.given_others is not None and not (hopeless and clash.given_others == clash.alone):
            sentences.append(
                f"with the other limits kept, {clash.limit.key!r} can be {short(clash.given_others, clash.limit.sign)}"
            )
    return sentences, clashes


def _best(compiled: Compiled, row: int, others: list[int], time_limit: Number) -> float | None:
    """The best value of a limited key under other limits; None where those clash."""
    point = minimise(compiled, compiled.rows[row], others, [], time_limit, 0.0)
    return None if point.columns is None else _feasible_value(compiled, row, point.columns)


def _feasible_value(compiled: Compiled, row: int, columns: np.ndarray) -> float:
    """The sum of a limited key over a choice, as a number that the choice meets as a limit."""
    limit = compiled.program.plain_limits[row]
    total = compiled.program.totals(compiled.choice(columns), limit.key)
    value = float(total)
    if limit.sign * total > limit.sign * exact(value):
        value = nextafter(value, limit.sign * inf)
    return value


def _require(name: str, value: object, kind: Any, holds: bool, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not holds:
        raise PuzzleError(f"{name} is {value!r}, but must be {rule}")
