"""The choice of one alternative per group as a mixed-integer program.

    minimise  sum score[g, a] x[g, a]   subject to   sum_a x[g, a] = 1 for each group g,   x binary,
              sum cost[g, a] x[g, a] <= limit (or >=) for each limit, and for those of one set of each disjunction,
              and for further solutions  sum x * x_previous <= groups - min_distance
              or, where alternatives have classes,  sum over the classes of x_previous <= groups - min_distance

(Puzzle, arXiv 2411.19146, section 4.) A group is a layer, or one sub-block of a layer, so that sub-blocks with additive
scores and costs need no product of alternatives; `program.library` describes what a program chooses from. A cost that
every choice shares is a group with one alternative.

`program.minimise` finds one solution. Every solution is summed again as decimal fractions, as written in the library,
and rejected if it violates a limit at all. The error for an infeasible program names the limits that conflict and the
best value that each could have (`program.explain`).

Left out: products of variables (interactions between groups).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from math import inf

import numpy as np

from puzzle_jax.errors import PuzzleError, check_range
from puzzle_jax.numeric import Number
from puzzle_jax.program.compile import Compiled, Cut, Point, compile_program
from puzzle_jax.program.explain import explain
from puzzle_jax.program.highs import least_excess
from puzzle_jax.program.library import Program, Solution
from puzzle_jax.program.minimise import minimise

_MOST_SOLUTIONS = 10_000


def solve(
    program: Program,
    *,
    num_solutions: int = 1,
    min_distance: int = 1,
    time_limit: Number = 30.0,
    gap: Number = 1e-4,
    classes: Mapping[str, Mapping[str, Hashable]] | None = None,
) -> list[Solution]:
    """Returns the best choices, best first; fewer than asked for if no more exist at that distance.

    Args:
      num_solutions: size of the pool.
      min_distance: least number of groups in which any two solutions differ.
      time_limit: seconds for each solution; a feasible point found by then is accepted.
      gap: relative gap that counts as optimal; with a gap, "best first" holds to that gap.
      classes: for some groups, the class of each alternative. Only these groups then count for the distance, and only
        where the classes differ, so that with a distance of 1 every solution is the best of its pattern of classes.

    Raises:
      InfeasibleProgram: no choice meets the limits; names those that conflict and the best feasible values.
      PuzzleError: a setting is invalid, a class is missing, or the time limit passed with no feasible point.
    """
    check_range("num_solutions", num_solutions, 1, _MOST_SOLUTIONS)
    check_range("min_distance", min_distance, 1)
    check_range("time_limit", time_limit, 0, above=True)
    check_range("gap", gap, 0)
    # A solution stays within its class when a dominated alternative is replaced by one of the same class.
    compiled = compile_program(program, keep_dominated_by=1 if classes else num_solutions, classes=classes)
    alike = None if classes is None else _labels(compiled, classes)
    found: list[Cut] = []
    solutions: list[Solution] = []
    while len(solutions) < num_solutions:
        point = minimise(compiled, compiled.score, compiled.plain, found, time_limit, gap, compiled.row_sets)
        if point.columns is None and not solutions:
            if point.status == "infeasible":
                raise explain(program, time_limit)
            raise PuzzleError(f"no feasible choice was found in {time_limit:g} s; raise the time limit")
        if point.columns is None:
            break
        found.append(_cut(compiled, point.columns, min_distance, alike))
        solutions.append(_solution(compiled, point))
    return sorted(solutions, key=lambda solution: solution.score)


def _cut(compiled: Compiled, chosen: np.ndarray, min_distance: int, labels: np.ndarray | None) -> Cut:
    """The cut that keeps later solutions away from a choice; `labels` numbers the classes of columns, -1 is none."""
    if labels is None:
        return chosen, len(compiled.names) - min_distance
    own = labels[chosen]
    counted = own >= 0
    same = np.flatnonzero((labels == own[compiled.owner]) & counted[compiled.owner])
    return same, int(counted.sum()) - min_distance


def _labels(compiled: Compiled, classes: Mapping[str, Mapping[str, Hashable]]) -> np.ndarray:
    """Numbers the class of every column; -1 in groups without classes."""
    numbers: dict[Hashable, int] = {}
    names = [(compiled.names[group], name) for group, name in zip(compiled.owner, compiled.alternatives, strict=True)]
    return np.array(
        [numbers.setdefault(classes[group][name], len(numbers)) if group in classes else -1 for group, name in names]
    )


def elastic_solve(program: Program, *, time_limit: Number = 30.0) -> Solution:
    """Returns the choice that violates the limits least, by summed relative excess, and scores best among those.

    If the limits can be met this is `solve`'s first solution. `violated` names the limits that stay violated.
    """
    compiled = compile_program(program, keep_dominated_by=1)
    point = minimise(compiled, compiled.score, compiled.plain, [], time_limit, 1e-4, compiled.row_sets)
    if point.columns is not None:
        return _solution(compiled, point)
    found = [_least_violating(program, selected, time_limit) for selected in program.combinations()]
    return min(found, key=lambda pair: (round(pair[0], 9), pair[1].score))[1]


def _least_violating(program: Program, selected: dict[str, str], time_limit: Number) -> tuple[float, Solution]:
    """The least summed relative excess over the limits of the `selected` sets, and the best choice that has it."""
    compiled = compile_program(replace(program, limits=program.limits_of(selected)), keep_dominated_by=1)
    least = least_excess(compiled, time_limit)
    if least.columns is None or least.excess is None:
        raise PuzzleError(f"no choice was found in {time_limit:g} s; raise the time limit")
    best = least_excess(compiled, time_limit, within=least.excess)
    columns = least.columns if best.columns is None else best.columns
    return least.excess, _describe(program, compiled.choice(columns), best.status, None, selected)


def assess(program: Program, choice: Mapping[str, str]) -> Solution:
    """Returns a given choice with its totals and the limits it violates.

    Raises `PuzzleError` if it is not a choice of the library.
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
    program: Program, choice: dict[str, str], status: str, gap: float | None, selected: dict[str, str] | None = None
) -> Solution:
    costs = {key: float(program.totals(choice, key)) for key in program.keys}
    selected = program.select(choice) if selected is None else selected
    limits = program.limits_of(selected)
    violated = tuple(limit for limit in limits if not limit.is_met(program.totals(choice, limit.key)))
    return Solution(choice, float(program.totals(choice, program.minimize)), costs, status, gap, violated, selected)
