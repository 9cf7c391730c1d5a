"""The context that the stages of a search share: recipe, parent, alternatives, and the files of earlier stages."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path

import jax
from rich.console import Console

from puzzle_jax.config import RopeConfig
from puzzle_jax.consoles import plain_console
from puzzle_jax.costs.compute import Offer
from puzzle_jax.costs.scenario import Group, KlLimit
from puzzle_jax.costs.table import Costs
from puzzle_jax.errors import ConfigError, InfeasibleError, PuzzleWarning
from puzzle_jax.generate.batches import MicroBatch, micro_batches
from puzzle_jax.generate.traces import Trace, read_traces
from puzzle_jax.model.child import Child, ChildBlock
from puzzle_jax.processes.distributed import on_all, on_primary, primary_console, process_index
from puzzle_jax.processes.published import decided
from puzzle_jax.runs import open_run
from puzzle_jax.search.artifacts import RANKING, REFINED_COSTS, SCORES, TRACES
from puzzle_jax.search.evaluator import Evaluator
from puzzle_jax.search.parent import open_parent, run_identity
from puzzle_jax.search.rank.ranking import ranked_space
from puzzle_jax.search.recipe import TRACE_SETS, Recipe
from puzzle_jax.search.refine.accept import Pool
from puzzle_jax.search.refine.floors import pool_within
from puzzle_jax.search.score.ending import ending_weights
from puzzle_jax.search.score.groups import parent_entropies
from puzzle_jax.search.score.measurements import longest_context
from puzzle_jax.search.score.replace_one import Alternative, ReplaceOne, child_choices
from puzzle_jax.search.score.scores_file import scores_from_json
from puzzle_jax.search.score.space_scorer import SpaceScorer
from puzzle_jax.search.score.whole_children import Measurements
from puzzle_jax.search.solve.floors import Floor, MeasuredFloors, floors_of
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores
from puzzle_jax.search.space import Space, Windows, candidate_counts, candidate_windows, narrower_windows, restrict
from puzzle_jax.tasks import get_task


class Search:
    """One search in one run directory; the console shows progress and tables.

    With several processes only the primary one has the run directory and a console; in the others `run` is the
    directory `copies`, which holds the files of the run that they read (`search.copies`).

    Raises `PuzzleError` at once for a parent that cannot be used, tasks that do not exist, and a run directory that
    belongs to something else.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None, copies: Path | None = None) -> None:
        self.recipe, self.primary = recipe, process_index() == 0
        self.console = primary_console(console or plain_console(width=150))
        self.parent = open_parent(recipe)
        self.counts, self.windows = on_all("read the recipe", self._offered)
        on_primary("check the limits on KL", self._check_limited)
        on_primary("open the run", lambda: open_run(recipe.run, run_identity(self.parent)))
        self.run = copies or recipe.run
        if recipe.evaluate.rounds and recipe.mesh.processes > 1:
            warnings.warn(
                f"evaluate.rounds is {recipe.evaluate.rounds}, but mesh.processes is {recipe.mesh.processes}, and "
                "tokens per second are measured by one process alone: they are left out",
                PuzzleWarning,
                stacklevel=2,
            )

    def _offered(self) -> tuple[tuple[tuple[int, ...], ...], Windows]:
        """Expert counts and windows offered in each layer; warns of windows that change nothing in any scenario."""
        config, space = self.parent.config, self.recipe.space
        counts = candidate_counts(
            config.blocks[0].num_experts, config.experts_per_token, space.fractions, space.divisor
        )
        asked = space.windows_for(config)
        windows = candidate_windows(config, asked)
        counts, windows = restrict([counts] * config.num_layers, windows, space.restrict)
        self._check_tasks()
        longest = max(self.recipe.scenarios, key=lambda scenario: scenario.context_tokens)
        windows, left_out = narrower_windows(windows, longest.context_tokens)
        too_wide = {*left_out, *(window for window in asked if window >= config.max_position)}
        warn_of_windows(
            too_wide,
            f"scenario {longest.name!r} never has more than {longest.context_tokens} tokens in a request, which such a "
            "window covers",
        )
        if not config.variant.sinks and any(len(of_layer) > 1 for of_layer in windows):
            warnings.warn(
                f"space.windows is {', '.join(map(str, asked))}, but {self.recipe.parent} has no attention "
                "sinks: layers that do not see a prompt's first tokens may lose more than scores on short traces tell",
                PuzzleWarning,
                stacklevel=2,
            )
        return counts, windows

    def _check_tasks(self) -> None:
        """Raises `ConfigError` for tasks that do not exist, and if there are neither tasks nor traces."""
        for task in self.recipe.traces.tasks:
            get_task(task)
        if not self.recipe.traces.tasks and self.recipe.traces.file is None:
            raise ConfigError(
                "traces.tasks is empty and traces.file is null, but a search needs problems to ask the parent, or its "
                "answers"
            )

    def _check_limited(self) -> None:
        """Raises `ConfigError` for limits on the KL of groups that the tasks or the file of traces do not have."""
        file, max_kl = self.recipe.traces.file, self.recipe.target.max_kl
        if not max_kl.is_empty:
            max_kl.limits(self._kinds if file is None else kinds_in(read_traces(file, self.parent.chat)))

    @property
    def _kinds(self) -> list[tuple[str, str]]:
        """Every task that is asked, with every effort."""
        return list(product(self.recipe.traces.tasks, self.recipe.traces.efforts))

    # Settings of stages ---------------------------------------------------------------------------------------------

    @property
    def task_identities(self) -> dict[str, str]:
        """The identity of every task."""
        return {task: get_task(task).identity for task in self.recipe.traces.tasks}

    @property
    def scenarios(self) -> list[dict[str, object]]:
        return [asdict(scenario) for scenario in self.recipe.scenarios]

    @property
    def offer(self) -> Offer:
        return Offer(self.parent.config, self.counts, self.windows)

    @property
    def identity(self) -> str:
        """Identifies everything that scores depend on besides alternatives and traces."""
        return json.dumps([run_identity(self.parent)["parent"], jax.__version__])

    @cached_property
    def kl_limits(self) -> tuple[KlLimit, ...]:
        """The target's limits on the KL of groups; where traces come from a file, once they have been split."""
        if self.recipe.target.max_kl.is_empty:
            return ()
        asked = self.recipe.traces.file is None
        if asked:
            return self.recipe.target.max_kl.limits(self._kinds)
        deciding = [trace for name in TRACE_SETS[:3] for trace in self.traces(name)]
        return self.recipe.target.max_kl.limits(kinds_in(deciding))

    @property
    def limited_groups(self) -> tuple[Group, ...]:
        return tuple(dict.fromkeys(limit.group for limit in self.kl_limits))

    # What earlier stages have written -------------------------------------------------------------------------------

    def traces(self, name: str) -> Sequence[Trace]:
        return TRACES[name].read(self.run)

    def batches(self, name: str) -> list[MicroBatch]:
        return micro_batches(self.traces(name))

    @property
    def evidenced_windows(self) -> Windows:
        """Windows that some calibration trace exceeds; all windows while there are no traces."""
        if not (self.run / TRACES["calibration"].path).exists():
            return self.windows
        return narrower_windows(self.windows, longest_context(self.traces("calibration")))[0]

    def ranked_space(self) -> Space:
        """The keep-sets that the ranking rules propose, with the windows that traces give evidence of."""
        return ranked_space(
            self.parent.config, self.counts, self.evidenced_windows, RANKING.read(self.run), self.recipe.rank.rules
        )

    @cached_property
    def costs(self) -> Costs:
        return REFINED_COSTS.read(self.run)

    def scored_space(self) -> Space:
        """The space whose alternatives have scores."""
        return Space.from_json(self.parent.config, SCORES.read(self.run)["layers"])

    def problem(self) -> Problem:
        """The integer program for the recipe's target, with the scores around the parent."""
        groups = [group.name for group in self.limited_groups]
        return self.problem_of(self.scored_space(), scores_from_json(SCORES.read(self.run)["layers"], groups))

    def problem_of(
        self,
        space: Space,
        scores: Scores,
        around: Candidate | None = None,
        entropy: Mapping[str, float] | None = None,
    ) -> Problem:
        """The integer program for scores around the parent or a child; `entropy` is the parent's by limited group, by
        default what the stage score wrote."""
        base = None if around is None else around.measured_kl
        return Problem(space, scores, self.costs, self.recipe.target, self.floors(entropy, base))

    def floors(
        self, entropy: Mapping[str, float] | None = None, base: Mapping[str, float] | None = None
    ) -> tuple[Floor, ...]:
        """The target's limits on the KL of groups, for scores that are differences from a model with the KLs `base`."""
        if not self.kl_limits:
            return ()
        return floors_of(self.kl_limits, SCORES.read(self.run)["entropy"] if entropy is None else entropy, base)

    def measured_floors(self, name: str) -> MeasuredFloors | None:
        """The same as they are checked on a set of traces; None without any."""
        if not self.kl_limits:
            return None
        weigh = ending_weights(self.parent.chat, *self.recipe.score.ending)
        return MeasuredFloors.on(self.floors(), self.traces(name), name, weigh)

    # What stages compute with ---------------------------------------------------------------------------------------

    def child(self, candidate: Candidate) -> Child:
        """A candidate as a view on the parent."""
        kept = zip(candidate.kept, candidate.blocks, strict=True)
        blocks = tuple(ChildBlock(of_layer, block.window) for of_layer, block in kept)
        factor, rope = self.recipe.child.yarn_factor, self.parent.config.rope
        return Child(self.parent.config, blocks, rope=None if factor is None else replace(rope, factor=factor))

    def scorer(self, around: Candidate | None = None, entropy: Mapping[str, float] | None = None) -> SpaceScorer:
        """A scorer of alternatives to the parent's sub-blocks, or those of a child; `entropy` as in `problem_of`."""
        base = None if around is None else self.child(around)
        settings = self.recipe.score
        run = self._runner(None if base is None else child_choices(base), None if base is None else base.rope)
        traces, seed = self.traces("calibration"), self.recipe.traces.seed
        base_kl = 0.0 if around is None else around.score
        problem = partial(self.problem_of, around=around, entropy=entropy)
        weigh = ending_weights(self.parent.chat, *settings.ending)
        return SpaceScorer(run, traces, settings, problem, self.console, seed, base_kl, self.limited_groups, weigh)

    def _runner(self, base: Sequence[Alternative] | None = None, rope: RopeConfig | None = None) -> ReplaceOne:
        settings, parent = self.recipe.score, self.parent
        return ReplaceOne(
            parent.params,
            parent.config,
            base,
            rope,
            per_call=settings.per_call,
            keep_every=settings.keep_every,
            mesh=parent.mesh,
        )

    def entropies(self) -> dict[str, float]:
        """The parent's mean entropy on the calibration traces, by group whose KL is limited relative to it."""
        groups = dict.fromkeys(limit.group for limit in self.kl_limits if limit.form == "share_of_entropy")
        return parent_entropies(self._runner(), self.traces("calibration"), list(groups)) if groups else {}

    def evaluator(self, kept: Path) -> Evaluator:
        """An evaluator of children that saves its results in `kept`, so that a killed run can resume."""
        return Evaluator(self.parent, self.recipe, self.console, kept, self.identity)

    def measure(self, candidates: Sequence[Candidate], name: str, evaluator: Evaluator) -> Measurements:
        """KL of whole candidates on a set of traces."""
        return evaluator.divergence([self.child(candidate) for candidate in candidates], self.traces(name), name)

    def pool(
        self,
        problem: Problem,
        evaluator: Evaluator,
        others: Sequence[Candidate] = (),
        around: Candidate | None = None,
    ) -> Pool:
        """The integer program's solutions and the `others` that meet the target, run whole on the validation traces.

        The integer program minimises the sum of scores, which only approximates the KL of the whole model, so other
        choices may have a lower KL. If scores `around` a child allow no choice within the floors, the child is all that
        there is. Limits on the KL of groups are tightened if no solution meets them on these traces
        (`search.refine.floors`).
        """
        options, floors = self.recipe.solve, self.measured_floors("validation")

        def solved(problem: Problem) -> list[Candidate]:
            return problem.solve(num_solutions=options.solutions, time_limit=options.time_limit, gap=options.gap)

        def within(floors: Sequence[Floor], otherwise: Sequence[Candidate] = ()) -> Sequence[Candidate]:
            try:
                return solved(replace(problem, floors=tuple(floors)))
            except InfeasibleError:
                return otherwise

        def measured(candidates: Sequence[Candidate]) -> Pool:
            return Pool.measured(candidates, self.measure(candidates, "validation", evaluator), floors)

        if around is None or floors is None:
            found = decided_candidates(lambda: solved(problem))
        else:
            found = decided_candidates(lambda: within(problem.floors, [replace(around, score=0.0)]))
        known = {(candidate.blocks, candidate.kept) for candidate in found}
        found += [other for other in others if other.meets_target and (other.blocks, other.kept) not in known]
        pool = measured(found)
        if floors is not None:
            pool = pool_within(pool, problem.floors, lambda f: decided_candidates(lambda: within(f)), measured)
        return pool


def kinds_in(traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """Every pair of task and effort that traces have."""
    return list(dict.fromkeys((trace.task, trace.effort) for trace in traces))


def decided_candidates(solve: Callable[[], Sequence[Candidate]]) -> list[Candidate]:
    """A solver's candidates as the primary process finds them: with a time limit, processes may find different ones."""
    return [Candidate.from_json(found) for found in decided(lambda: [found.to_json() for found in solve()])]


def warn_of_windows(left_out: Sequence[int] | set[int], reason: str) -> None:
    """Warns of windows that are not offered as alternatives, if there are any, widest first."""
    if left_out:
        listed = ", ".join(map(str, sorted(left_out, reverse=True)))
        warnings.warn(f"space.windows: {listed} left out, since {reason}", PuzzleWarning, stacklevel=2)
