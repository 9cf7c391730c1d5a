"""The trade-off of quality against speed: the integer program at a series of speed targets, and uniform pruning."""

from __future__ import annotations

from dataclasses import dataclass, replace

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.solve.baselines import uniform_candidates
from puzzle_jax.search.solve.problem import Candidate, Problem

STEP, MOST_POINTS = 0.1, 40
SECONDS, GAP = 10.0, 1e-3
"""Time limit and gap for each point, sufficient for a figure."""


@dataclass(frozen=True)
class FrontierPoint:
    """An architecture on the curve.

    Attributes:
      speedup: predicted tokens per second over the parent's, the least of all scenarios.
      score: predicted KL, nats per token.
      label: the speed-up asked for, or the name of the architecture.
    """

    speedup: float
    score: float
    label: str


def frontier(problem: Problem) -> list[FrontierPoint]:
    """The least score at every speed-up from 1 in steps of `STEP`, keeping the target's other limits, up to the fastest
    possible."""
    points: list[FrontierPoint] = []
    for number in range(MOST_POINTS):
        asked = round(1 + STEP * number, 6)
        try:
            target = replace(problem.target, min_speedup=asked)
            (best,) = replace(problem, target=target).solve(time_limit=SECONDS, gap=GAP)
        except PuzzleError:  # infeasible, or nothing found in time
            break
        points.append(FrontierPoint(speedup(problem, best), best.score, f"{asked:g}x asked for"))
    return points


def uniform_frontier(problem: Problem) -> list[FrontierPoint]:
    """Every uniform architecture, whether or not it meets the target."""
    return [FrontierPoint(speedup(problem, c), c.score, c.name) for c in uniform_candidates(problem)]


def speedup(problem: Problem, candidate: Candidate) -> float:
    """Predicted tokens per second over the parent's, each at its own batch, in the scenario where it gains least."""
    costs, parent = problem.costs, problem.space.parent.blocks

    def gain(scenario: str) -> float:
        rate = costs.tokens_per_second(candidate.blocks, scenario, candidate.batches[scenario])
        return rate / costs.tokens_per_second(parent, scenario)

    return min(gain(scenario.name) for scenario in costs.scenarios)
