"""`puzzle search solve --library FILE.json --minimize KEY [--at-most KEY=VALUE,...]`.

Solves the integer program alone, for any library {layer: {alternative: {nested numbers}}} in a JSON file, whatever its
origin; keys of nested numbers are joined by dots ("metrics.kl_div", "stats.runtime_ms"). Needs neither a model nor JAX.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.files import Json
from puzzle_jax.numeric import Number, is_number, short
from puzzle_jax.program.explain import InfeasibleProgram
from puzzle_jax.program.library import Library, Limit, Program, Solution
from puzzle_jax.program.solve import solve

_DEEPEST = 32
_MOST_SWEPT = 1000


@dataclass(frozen=True)
class LibrarySettings:
    """One integer program over a library.

    Attributes:
      library: JSON file, {layer: {alternative: {nested numbers}}}.
      minimize: dotted key of the number to sum and minimise.
      at_most: upper limits on sums, by key.
      at_least: lower limits on sums, by key.
      sweep: solve for each of several upper limits on a key: KEY=V1,V2,... or KEY=LOW:HIGH:N.
      solutions: number of different solutions.
      min_distance: fewest layers in which any two solutions differ.
      time_limit: seconds for each solution.
      gap: relative gap that counts as optimal.
      json: prints JSON instead of tables.
    """

    library: Path
    minimize: str
    at_most: Mapping[str, int | float] = field(default_factory=dict)
    at_least: Mapping[str, int | float] = field(default_factory=dict)
    sweep: str | None = None
    solutions: int = 1
    min_distance: int = 1
    time_limit: float = 30.0
    gap: float = 1e-4
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("at_most", "at_least"):
            for key, value in getattr(self, name).items():
                if not is_number(value):
                    raise ConfigError(f"{name} has {shown(value)} for {shown(key)}, but must have finite numbers")
        if self.sweep is not None and self.solutions != 1:
            raise ConfigError(f"solutions is {self.solutions}, but must be 1 with sweep")


def read_library(path: Path) -> Library:
    """Reads a library from a file; `Program` checks the numbers in it.

    Raises `PuzzleError` if it cannot be read, is not an object, has a name twice, or is nested too deep.
    """
    try:
        library = json.loads(path.read_text(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise PuzzleError(f"cannot be read as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(library, dict):
        raise PuzzleError(f"holds {shown(library)}, but must hold an object of layers")
    level: list[Json] = [library]
    for _ in range(_DEEPEST):
        level = [value for mapping in level for value in mapping.values() if isinstance(value, dict)]
    if level:
        raise PuzzleError(f"is nested deeper than {_DEEPEST} levels, but must be layer, alternative and numbers")
    return library


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    for name, times in Counter(name for name, _ in pairs).items():
        if times > 1:
            raise PuzzleError(f"has {shown(name)} twice in one object, but names must differ")
    return dict(pairs)


def run(settings: LibrarySettings) -> None:
    """Solves the program and prints solutions or the frontier. Raises `PuzzleError`, naming the file, on failure."""
    limits = [Limit(key, at_most=value) for key, value in settings.at_most.items()]
    limits += [Limit(key, at_least=value) for key, value in settings.at_least.items()]
    sweep = None if settings.sweep is None else _sweep(settings.sweep)
    solved = partial(solve, time_limit=settings.time_limit, gap=settings.gap)
    try:
        program = Program(read_library(settings.library), settings.minimize, tuple(limits))
        if settings.min_distance > len(program.library):
            groups = len(program.library)
            raise PuzzleError(f"min_distance is {settings.min_distance}, but there are only {groups} layers")
        if sweep is None:
            solutions = solved(program, num_solutions=settings.solutions, min_distance=settings.min_distance)
            content, table = {"solutions": [_as_json(solution) for solution in solutions]}, _table(solutions, program)
        else:
            key, points = sweep[0], _frontier(program, *sweep, solved)
            frontier = [{"at_most": bound, "solution": found and _as_json(found)} for bound, found in points]
            content, table = {"key": key, "frontier": frontier}, _frontier_table(points, key, program)
    except PuzzleError as error:
        raise PuzzleError(f"{settings.library}: {error}") from error
    if settings.json:
        print(json.dumps(content, indent=2))
    else:
        plain_console().print(table)


def _sweep(text: str) -> tuple[str, list[Number]]:
    """The key and the upper limits to try, largest first."""
    key, _, values = text.rpartition("=")
    *ends, steps = values.split(":")
    try:
        bounds = [_number(value) for value in ends or values.split(",")]
        if len(ends) == 2 and bounds[0] < bounds[1] and 2 <= int(steps) <= _MOST_SWEPT:
            bounds = np.linspace(bounds[0], bounds[1], int(steps)).tolist()
        elif ends:
            raise ValueError
    except ValueError:
        bounds = []
    if not key or not bounds or not all(map(is_number, bounds)):
        raise PuzzleError(
            f"sweep is {shown(text)}, but must be KEY=V1,V2,... of finite numbers, or KEY=LOW:HIGH:N with LOW < HIGH "
            f"and N from 2 to {_MOST_SWEPT}"
        )
    return key, sorted(bounds, reverse=True)


def _number(text: str) -> Number:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _frontier(
    program: Program, key: str, bounds: Sequence[Number], solved: Callable[[Program], list[Solution]]
) -> list[tuple[Number, Solution | None]]:
    """The best solution for each upper limit on a key; None where there is none."""
    points: list[tuple[Number, Solution | None]] = []
    for bound in bounds:
        limited = replace(program, limits=(*program.limits, Limit(key, at_most=bound)))
        try:
            points.append((bound, solved(limited)[0]))
        except InfeasibleProgram:
            points.append((bound, None))
    return points


def _as_json(solution: Solution) -> dict[str, Json]:
    return {
        "choice": solution.choice,
        "value": solution.score,
        "costs": solution.costs,
        "status": solution.status,
        "gap": solution.gap,
    }


def _gap(solution: Solution) -> str:
    return "unknown" if solution.gap is None else f"{solution.gap:.3%}"


def _table(solutions: Sequence[Solution], program: Program) -> Table:
    """Sums of every solution side by side, then their choices."""
    table = Table("", *(f"solution {i + 1}" for i in range(len(solutions))))
    for key in program.keys:
        name = f"{key} (minimised)" if key == program.minimize else key
        table.add_row(Text(name), *(short(solution.costs[key], 0) for solution in solutions))
    table.add_row("status", *(solution.status for solution in solutions))
    table.add_row("gap", *(_gap(solution) for solution in solutions), end_section=True)
    for group in program.library:
        table.add_row(Text(group), *(Text(solution.choice[group]) for solution in solutions))
    return table


def _frontier_table(points: Sequence[tuple[Number, Solution | None]], key: str, program: Program) -> Table:
    table = Table("at most", "status", "gap")
    for header in (key, program.minimize):
        table.add_column(Text(header))
    for bound, found in points:
        cells = ["infeasible", "-", "-", "-"]
        if found is not None:
            cells = [found.status, _gap(found), short(found.costs[key], 0), short(found.score, 0)]
        table.add_row(short(bound, 0), *cells)
    return table
