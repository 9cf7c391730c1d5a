"""`puzzle search solve --library FILE.json --minimize KEY [--at-most KEY=VALUE,...]`.

The program by itself, for any library {layer: {alternative: {nested numbers}}} in a JSON file, whoever measured it;
keys of nested numbers are joined by dots ("metrics.kl_div", "stats.runtime_ms"). No model is needed, and no JAX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from puzzle_jax.consoles import plain_console
from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.numeric import Number, is_number, short
from puzzle_jax.program.explain import InfeasibleProgram
from puzzle_jax.program.library import Library, Limit, Program, Solution
from puzzle_jax.program.solve import solve

_DEEPEST = 32
_MOST_SWEPT = 1000


@dataclass(frozen=True)
class LibrarySettings:
    """One program over a library.

    Attributes:
      library: JSON file, {layer: {alternative: {nested numbers}}}.
      minimize: dotted key of the number to sum and minimise.
      at_most: upper limits on sums, by key.
      at_least: lower limits on sums, by key.
      sweep: solve for each of several upper limits on a key: KEY=V1,V2,... or KEY=LOW:HIGH:N.
      solutions: how many different ones.
      min_distance: layers in which any two differ at least.
      time_limit: seconds for each solution.
      gap: relative gap that counts as optimal.
      json: prints for programs.
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
    """A library from a file; the numbers in it are for `Program` to check.

    Raises `PuzzleError` when it cannot be read, is no object, has a name twice, or is nested too deep.
    """
    try:
        library = json.loads(path.read_text(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise PuzzleError(f"cannot be read as JSON: {' '.join(str(error).split())}") from error
    if not isinstance(library, dict):
        raise PuzzleError(f"holds {shown(library)}, but must hold an object of layers")
    level: list[Any] = [library]
    for _ in range(_DEEPEST):
        level = [value for mapping in level for value in mapping.values() if isinstance(value, dict)]
    if level:
        raise PuzzleError(f"is nested deeper than {_DEEPEST} levels, but must be layer, alternative and numbers")
    return library


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise PuzzleError(f"has {shown(name)} twice in one object, but names must differ")
        found[name] = value
    return found


def run(settings: LibrarySettings) -> None:
    """Solves, and prints solutions or the frontier. Raises `PuzzleError`, which names the file, where it cannot."""
    limits = [Limit(key, at_most=value) for key, value in settings.at_most.items()]
    limits += [Limit(key, at_least=value) for key, value in settings.at_least.items()]
    sweep = None if settings.sweep is None else _sweep(settings.sweep)
    options: dict[str, Any] = {"time_limit": settings.time_limit, "gap": settings.gap}
    try:
        program = Program(read_library(settings.library), settings.minimize, tuple(limits))
        if settings.min_distance > len(program.library):
            groups = len(program.library)
            raise PuzzleError(f"min_distance is {settings.min_distance}, but there are only {groups} layers")
        if sweep is None:
            pool = {"num_solutions": settings.solutions, "min_distance": settings.min_distance}
            solutions = solve(program, **pool, **options)
            points = []
        else:
            solutions, points = [], _frontier(program, *sweep, options)
    except PuzzleError as error:
        raise PuzzleError(f"{settings.library}: {error}") from error
    if settings.json and sweep is None:
        print(json.dumps({"solutions": [_as_json(solution) for solution in solutions]}, indent=2))
    elif settings.json and sweep is not None:
        frontier = [{"at_most": bound, "solution": found and _as_json(found)} for bound, found in points]
        print(json.dumps({"key": sweep[0], "frontier": frontier}, indent=2))
    elif sweep is None:
        _show(solutions, program)
    else:
        _show_frontier(points, sweep[0], program)


def _sweep(text: str) -> tuple[str, list[Number]]:
    """The key and the upper limits to try, largest first."""
    key, _, values = text.rpartition("=")
    parts = values.split(":")
    if len(parts) == 3:
        low, high = (_number(text, part, bool(key)) for part in parts[:2])
        if not parts[2].isdecimal() or not 2 <= int(parts[2][:6]) <= _MOST_SWEPT or low >= high:
            raise PuzzleError(f"sweep is {shown(text)}, but must be KEY=LOW:HIGH:N with LOW < HIGH, 2 <= N <= 1000")
        bounds: list[Number] = [float(bound) for bound in np.linspace(low, high, int(parts[2]))]
    else:
        bounds = [_number(text, part, bool(key)) for part in values.split(",")]
    return key, sorted(bounds, reverse=True)


def _number(text: str, value: str, has_key: bool) -> Number:
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        if has_key and is_number(number):
            return number
    raise PuzzleError(f"sweep is {shown(text)}, but must be a key, '=' and finite numbers")


def _frontier(
    program: Program, key: str, bounds: Sequence[Number], options: Mapping[str, Any]
) -> list[tuple[Number, Solution | None]]:
    """The best solution for each upper limit on a key; None where there is none."""
    points: list[tuple[Number, Solution | None]] = []
    for bound in bounds:
        limited = replace(program, limits=(*program.limits, Limit(key, at_most=bound)))
        try:
            points.append((bound, solve(limited, **options)[0]))
        except InfeasibleProgram:
            points.append((bound, None))
    return points


def _as_json(solution: Solution) -> dict[str, Any]:
    return {
        "choice": solution.choice,
        "value": solution.score,
        "costs": solution.costs,
        "status": solution.status,
        "gap": solution.gap,
    }


def _gap(solution: Solution) -> str:
    return "unknown" if solution.gap is None else f"{solution.gap:.3%}"


def _show(solutions: Sequence[Solution], program: Program) -> None:
    """Sums of every solution side by side, then their choices."""
    table = Table("", *(f"solution {i + 1}" for i in range(len(solutions))))
    for key in program.keys:
        name = f"{key} (minimised)" if key == program.minimize else key
        table.add_row(Text(name), *(short(solution.costs[key], 0) for solution in solutions))
    table.add_row("status", *(solution.status for solution in solutions))
    table.add_row("gap", *(_gap(solution) for solution in solutions), end_section=True)
    for group in program.library:
        table.add_row(Text(group), *(Text(solution.choice[group]) for solution in solutions))
    plain_console().print(table)


def _show_frontier(points: Sequence[tuple[Number, Solution | None]], key: str, program: Program) -> None:
    table = Table("at most", "status", "gap")
    for header in (key, program.minimize):
        table.add_column(Text(header))
    for bound, found in points:
        cells = ["infeasible", "-", "-", "-"]
        if found is not None:
            cells = [found.status, _gap(found), short(found.costs[key], 0), short(found.score, 0)]
        table.add_row(short(bound, 0), *cells)
    plain_console().print(table)
