"""The stage of a search that trains finalists."""

from __future__ import annotations

from pathlib import Path

from puzzle_jax.search.artifacts import SOLUTIONS
from puzzle_jax.search.context import Search
from puzzle_jax.search.finalists.contest import Contest, contenders, hold
from puzzle_jax.search.finalists.training import ShortDistillation
from puzzle_jax.search.recipe import TRAINING
from puzzle_jax.search.solve.problem import Candidate


def contest_of(search: Search, kept: Path) -> Contest:
    """Trains the finalists of a search; those that a killed run left in `kept` are not trained again."""
    options, solver = search.recipe.finalists, search.recipe.solve
    solved = sorted(SOLUTIONS.read(search.run)["pool"], key=lambda found: found["validation"]["kl"])
    patterns = search.problem().by_reach(options.count, time_limit=solver.time_limit, gap=solver.gap)
    found = contenders(list(map(Candidate.from_json, solved)), patterns, search.parent.config, options.count)
    train = ShortDistillation(
        search.parent,
        options,
        [search.child(candidate) for candidate in found],
        search.traces(TRAINING),
        search.traces("validation"),
        search.recipe.traces.seed,
        search.console,
    )
    before = search.measure(found, "validation", search.evaluator(kept))
    return hold(found, before, lambda candidate: train(search.child(candidate)), options.steps, kept)
