"""Our `program.solve.solve` compared with CBC through PuLP on the same random integer programs, to the same proven gap.

    python benchmarks/milp.py [--instances 20] [--gap 0.01] [--time-limit 20] [--clock cpu] [--json PATH]

An instance chooses one of A alternatives in each of L layers, for the least total score within m limits on totals. All
kinds are drawn by numpy's default_rng([kind, L, A, m, instance]); U is uniform in [0, 1):

    independent   score U; each cost U; each limit 0.4 L. The hard one: a multi-dimensional multiple-choice knapsack
                  in which no alternative says anything about another.
    tight         as independent, but each limit 0.3 L: with 6 limits the relaxation's bound is 5 to 10% off.
    correlated    score U; each cost (U_shared + U) / 2 with U_shared the same for the alternative's m costs; each
                  limit 0.4 L.
    puzzle        like a measured block library. Alternative a removes the share f = a / (A - 1) of a layer, which
                  scores s f^2 (1 + 0.2 U), s = exp(N(0, 1)) per layer; cost r is w (1 - h f) (1 - 0.05 U), with
                  w = 0.5 + U per layer and cost, and h = 0.4 + 0.4 U per cost; each limit is 0.75 of the sum of w.
                  The parent itself (f = 0) costs w and scores 0.

Shown per kind and size: median and worst seconds to a proven gap of 1%, how many instances were proven in time, and
median and worst gap (score less proven bound, over score) when the solver stopped. Ours and CBC take turns instance by
instance and alternate in going first. An instance that is not proven counts with the seconds it took.

`--clock cpu` counts CPU seconds of the process (ours) and of the child process (CBC; PuLP's writing of files is not
counted), for shared machines. CBC's time limit is then in CPU seconds; ours is in wall-clock seconds, of which it gets
ten times as many. A proof counts only within the limit on the chosen clock. Without PuLP (extra `benchmarks`), CBC's
columns hold dashes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

from puzzle_jax.errors import PuzzleError
from puzzle_jax.program.library import Limit, Program
from puzzle_jax.program.solve import solve

try:
    import pulp  # pyright: ignore[reportMissingImports]
except ImportError:
    pulp = None

KINDS = ("independent", "tight", "correlated", "puzzle")
SIZES = ((36, 64, 3), (36, 64, 6), (96, 200, 3))


@dataclass(frozen=True)
class Instance:
    """scores [layers, alternatives], costs [limits, layers, alternatives], bounds [limits]."""

    scores: np.ndarray
    costs: np.ndarray
    bounds: np.ndarray

    def program(self) -> Program:
        names = [f"c{r}" for r in range(len(self.bounds))]
        library = {
            str(layer): {
                str(a): {
                    "score": float(score),
                    **{name: float(cost) for name, cost in zip(names, self.costs[:, layer, a], strict=True)},
                }
                for a, score in enumerate(row)
            }
            for layer, row in enumerate(self.scores)
        }
        limits = (Limit(name, at_most=float(bound)) for name, bound in zip(names, self.bounds, strict=True))
        return Program(library, "score", tuple(limits))


@dataclass(frozen=True)
class Outcome:
    """Seconds until a solver stopped, and the gap proven by then (infinite if it found no choice)."""

    seconds: float
    gap: float


def draw(kind: str, layers: int, alternatives: int, limits: int, instance: int) -> Instance:
    """Draws a random instance, as described in the module's docstring."""
    random = np.random.default_rng([KINDS.index(kind), layers, alternatives, limits, instance])
    shape = (limits, layers, alternatives)
    if kind == "puzzle":
        removed = np.arange(alternatives) / (alternatives - 1)
        sensitivity = np.exp(random.normal(size=(layers, 1)))
        scores = sensitivity * removed**2 * (1 + 0.2 * random.random((layers, alternatives)))
        weight = 0.5 + random.random((limits, layers, 1))
        share = 0.4 + 0.4 * random.random((limits, 1, 1))
        noise = np.where(removed > 0, 1 - 0.05 * random.random(shape), 1.0)
        return Instance(scores, weight * (1 - share * removed) * noise, 0.75 * weight.sum(axis=(1, 2)))
    scores, costs = random.random((layers, alternatives)), random.random(shape)
    if kind == "correlated":
        costs = (costs + random.random((1, layers, alternatives))) / 2
    return Instance(scores, costs, np.full(limits, (0.3 if kind == "tight" else 0.4) * layers))


def ours(instance: Instance, gap: float, time_limit: float, clock: str) -> Outcome:
    program = instance.program()
    now = time.process_time if clock == "cpu" else time.monotonic
    started = now()
    try:
        [solution] = solve(program, gap=gap, time_limit=time_limit * (10 if clock == "cpu" else 1))
    except PuzzleError:
        return Outcome(now() - started, np.inf)
    return Outcome(now() - started, np.inf if solution.gap is None else solution.gap)


def cbc(instance: Instance, gap: float, time_limit: float, clock: str) -> Outcome:
    assert pulp is not None
    problem = pulp.LpProblem("program", pulp.LpMinimize)
    layers, alternatives = instance.scores.shape
    x = [[pulp.LpVariable(f"x_{i}_{a}", cat="Binary") for a in range(alternatives)] for i in range(layers)]
    flat = [variable for row in x for variable in row]
    problem += pulp.LpAffineExpression(zip(flat, instance.scores.ravel().tolist(), strict=True))
    for row in x:
        problem += pulp.lpSum(row) == 1
    for cost, bound in zip(instance.costs, instance.bounds, strict=True):
        problem += pulp.LpAffineExpression(zip(flat, cost.ravel().tolist(), strict=True)) <= float(bound)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        mode = "cpu" if clock == "cpu" else "elapsed"
        solver = pulp.PULP_CBC_CMD(msg=False, gapRel=gap, timeLimit=time_limit, timeMode=mode, logPath=str(log))
        before, started = os.times(), time.monotonic()
        problem.solve(solver)
        after = os.times()
        seconds = time.monotonic() - started
        if clock == "cpu":
            seconds = after.children_user + after.children_system - before.children_user - before.children_system
        said = log.read_text()
    chosen = [[variable.value() or 0.0 for variable in row] for row in x]
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Outcome(seconds, np.inf)
    score = float((np.array(chosen).round() * instance.scores).sum())
    bound = re.search(r"^Lower bound:\s+(\S+)", said, re.MULTILINE)
    behind = max(0.0, score - float(bound[1])) / score if bound else 0.0
    # The log gives the bound to three decimals.
    return Outcome(seconds, min(behind, gap) if problem.sol_status == pulp.LpSolutionOptimal else behind)


def summary(outcomes: Sequence[Outcome], gap: float, time_limit: float) -> list[str]:
    """Median and worst seconds, how many were proven in time, median and worst gap."""
    if not outcomes:
        return ["-", "-", "-"]
    seconds = [outcome.seconds for outcome in outcomes]
    gaps = [outcome.gap for outcome in outcomes]
    proven = sum(o.gap <= gap * (1 + 1e-6) and o.seconds <= time_limit for o in outcomes)
    return [
        f"{np.median(seconds):.2f} / {max(seconds):.2f}",
        f"{proven}/{len(outcomes)}",
        f"{np.median(gaps):.2%} / {max(gaps):.2%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Our solver beside CBC.")
    parser.add_argument("--instances", type=int, default=20)
    parser.add_argument("--gap", type=float, default=0.01)
    parser.add_argument("--time-limit", type=float, default=20.0, help="seconds for each instance and solver")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--sizes", nargs="+", default=["x".join(map(str, size)) for size in SIZES], metavar="LxAxM")
    parser.add_argument("--without-cbc", action="store_true")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    solvers: dict[str, Callable[..., Outcome]] = {"ours": ours}
    if pulp is not None and not settings.without_cbc:
        solvers["CBC"] = cbc
    table = Table(
        "kind", "layers x alternatives, limits", title=f"seconds ({settings.clock}) to a proven gap of {settings.gap:g}"
    )
    for name in ("ours", "CBC"):
        for column in ("median / worst s", "proven", "gap, median / worst"):
            table.add_column(f"{name}: {column}", justify="right")
    console, everything = Console(width=160), []
    for kind in settings.kinds:
        for size in settings.sizes:
            layers, alternatives, limits = (int(number) for number in size.split("x"))
            outcomes: dict[str, list[Outcome]] = {"ours": [], "CBC": []}
            for number in range(settings.instances):
                instance = draw(kind, layers, alternatives, limits, number)
                for name in sorted(solvers, reverse=bool(number % 2)):
                    outcome = solvers[name](instance, settings.gap, settings.time_limit, settings.clock)
                    outcomes[name].append(outcome)
                    console.print(f"{kind} {size} {number} {name} {outcome.seconds:.2f} s, gap {outcome.gap:.3%}")
                    everything.append(
                        {"kind": kind, "size": size, "instance": number, "solver": name, **asdict(outcome)}
                    )
            cells = [summary(outcomes[name], settings.gap, settings.time_limit) for name in ("ours", "CBC")]
            table.add_row(kind, f"{layers} x {alternatives}, {limits}", *cells[0], *cells[1])
            if settings.json:
                settings.json.write_text(json.dumps(everything, indent=1))
    console.print(table)


if __name__ == "__main__":
    main()
