"""The work of the stage `refine`: refinements of the chosen child, and the KL to expect of the final one."""

from __future__ import annotations

from pathlib import Path

from puzzle_jax.search.artifacts import RANKING, REFINED_SCORE_TABLE, chosen_candidate, chosen_of_pool
from puzzle_jax.search.context import Search
from puzzle_jax.search.refine.accept import Attempt, refine
from puzzle_jax.search.refine.expected import expected_of_child
from puzzle_jax.search.refine.expert_values import ExpertValues
from puzzle_jax.search.refine.proposals import Refinement
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import Space


def refined_child(search: Search, kept: Path) -> tuple[Candidate, dict[str, float], list[Attempt]]:
    """The final child, the KL that is expected of it (`refine.expected`), and all attempts to refine it.

    Results of a killed run are read from `kept`, where this one's are saved.
    """
    options, evaluator = search.recipe.refine, search.evaluator(kept)
    space = search.scored_space()
    traces, seed = search.traces("calibration"), search.recipe.traces.seed
    solver = {"time_limit": search.recipe.solve.time_limit, "gap": search.recipe.solve.gap}

    def unlimited(space: Space, scores: Scores) -> Problem:
        """The integer program without floors, of which the values of experts know nothing."""
        return Problem(space, scores, search.costs, search.recipe.target)

    values = ExpertValues(space, unlimited, lambda child: search.scorer(child).run, traces, solver, seed)
    refinement = Refinement(
        space=space,
        removal_error=RANKING.read(search.run).scores["removal_error"],
        swaps=options.swaps,
        scorer=search.scorer,
        pool=lambda space, scores, child: search.pool(search.problem_of(space, scores, child), evaluator, around=child),
        measure=lambda candidates, name: search.measure(candidates, name, evaluator),
        table=search.run / REFINED_SCORE_TABLE,
        kept=kept,
        identity=f"{search.identity} {search.recipe.child}",
        floors=search.measured_floors,
        values=values if options.swaps_by == "gradients" else None,
    )
    chosen = chosen_candidate(search.run, search.recipe.finalists.count > 0)
    child, tried = refine(
        chosen,
        options.rounds,
        refinement.rescored,
        options.proposals if options.swaps else 0,
        refinement.swapped,
        refinement.confirm,
        refinement.breaks,
    )
    measured = [search.measure([child], name, evaluator) for name in ("validation", "confirmation")]
    validation, confirmation = ((found.kl[0], found.tokens) for found in measured)
    # A finalist was chosen by what training made of it, not by its own KL.
    of_pool = chosen_of_pool(search.run)
    by_kl = (chosen.blocks, chosen.kept) == ((of := Candidate.from_json(of_pool)).blocks, of.kept)
    luck = max(0.0, of_pool["expected"] - of_pool["validation"]["kl"]) if by_kl else 0.0
    return child, expected_of_child(luck, validation, confirmation), tried
