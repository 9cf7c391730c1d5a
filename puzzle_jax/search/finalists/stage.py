"""The stage of a search that trains finalists."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from puzzle_jax.search.artifacts import SOLUTIONS
from puzzle_jax.search.context import Search
from puzzle_jax.search.finalists.contest import Contest, contenders, hold
from puzzle_jax.search.finalists.training import ShortDistillation
from puzzle_jax.search.recipe import TRAINING
from puzzle_jax.search.refine.accept import Pool
from puzzle_jax.search.score.ending import ending_weights
from puzzle_jax.search.solve.problem import Candidate


def contest_of(search: Search, kept: Path) -> Contest:
    """Trains the finalists of a search; those that a killed run left in `kept` are not trained again."""
    found = contestants(search)
    train = trainer(search, found)
    before = search.measure(found, "validation", search.evaluator(kept))
    found = list(Pool.measured(found, before, search.measured_floors("validation")).candidates)
    return hold(found, before, lambda candidate: train(search.child(candidate)), search.recipe.finalists.steps, kept)


def contestants(search: Search) -> list[Candidate]:
    """The finalists of a search, not yet trained."""
    count, solver = search.recipe.finalists.count, search.recipe.solve
    solutions = SOLUTIONS.read(search.run)
    chosen, pool = solutions["pool"][solutions["chosen"]], solutions["pool"]
    solved = [chosen, *sorted((each for each in pool if each != chosen), key=lambda found: found["expected"])]
    patterns = search.problem().by_reach(count, time_limit=solver.time_limit, gap=solver.gap)
    return contenders([Candidate.from_json(each) for each in solved], patterns, search.parent.config, count)


def trainer(search: Search, candidates: Sequence[Candidate]) -> ShortDistillation:
    """Trains any of these candidates on a search's traces."""
    return ShortDistillation(
        search.parent.params,
        search.parent.config,
        search.parent.chat.pad_id,
        search.recipe.finalists,
        [search.child(candidate) for candidate in candidates],
        search.traces(TRAINING),
        search.traces("validation"),
        search.recipe.traces.seed,
        search.console,
        ending_weights(search.parent.chat, *search.recipe.score.ending),
        packed=search.parent.description.form == "mxfp4",
    )
