"""Scores a whole space: first estimates by the lens, then exact scores on as many traces as the choice needs.

The lens leaves the few best expert sets of each layer and count, and each of those is scored exactly. Scored pairs of
alternative and trace are saved as they come, so that a resumed run, or one for another target, starts from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from puzzle_jax.costs.scenario import Group
from puzzle_jax.generate.batches import TokenWeights, alike, micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.processes.published import values_of
from puzzle_jax.progress import progress
from puzzle_jax.search.recipe import ScoreSettings
from puzzle_jax.search.score.adaptive import RelaxedProgram, in_random_order, score_adaptively
from puzzle_jax.search.score.alternatives import IndexedAlternatives
from puzzle_jax.search.score.groups import group_estimates, group_evidence
from puzzle_jax.search.score.lens import fit_lens
from puzzle_jax.search.score.measurements import Fill, Runner, SavedTable, ScoreTable, longest_context
from puzzle_jax.search.score.replace_one import ReplaceOne
from puzzle_jax.search.solve.problem import Problem, Scores
from puzzle_jax.search.space import Space

LENS_TRACES = 96
"""The most traces that a lens is fitted to and run on."""

WINDOWS_FIRST = 8
"""Traces that windows are first scored on, as a multiple of those for expert sets."""

_LONG_TRACES = 4  # at least so many of them are longer than the window


@dataclass(frozen=True)
class ScoredSpace:
    """A space whose alternatives have scores; the lens may have dropped some.

    Attributes:
      indexed: the alternatives around the base.
      table: their scores.
      proposed: number of alternatives before the lens dropped any.
      groups: groups of traces whose KL is limited.
    """

    indexed: IndexedAlternatives
    table: ScoreTable
    proposed: int
    groups: tuple[Group, ...] = ()

    @property
    def space(self) -> Space:
        return self.indexed.space

    @property
    def scores(self) -> Scores:
        return self.indexed.scores(self.table.estimates(), self.group_estimates)

    @property
    def group_estimates(self) -> dict[str, Float[np.ndarray, "alternatives"]]:
        """Estimates by name of a limited group, and by number of the alternative."""
        return group_estimates(self.table, self.indexed, self.groups, self.table.estimates())


@dataclass(frozen=True)
class _WithFloors:
    """The relaxed program with the floors by the scores that there are when it is asked for; without floors, if no
    choice meets them by those scores."""

    scored: ScoredSpace
    problem: Callable[[Space, Scores], Problem]

    def __iter__(self) -> Iterator[RelaxedProgram]:
        problem, scores = self.problem(self.scored.space, self.scored.scores), self.scored.table.estimates()
        program = RelaxedProgram(problem.program, self.scored.indexed.owner)
        if not program.choice(scores).any():
            program = RelaxedProgram(replace(problem, floors=()).program, self.scored.indexed.owner)
        yield program


@dataclass(frozen=True)
class SpaceScorer:
    """Scores spaces on traces.

    Attributes:
      run: replaces one sub-block at a time in the base.
      traces: traces of the parent.
      settings: how alternatives are scored.
      problem: makes the problem that the scores are for, from a space and its scores.
      console: where progress is shown.
      seed: random seed of the order of traces and of adaptive scoring's draws.
      base_kl: predicted KL of the base; 0 for the parent.
      groups: groups of traces whose KL the problem limits.
      weigh: weights of the traces' completion tokens.
    """

    run: ReplaceOne
    traces: Sequence[Trace]
    settings: ScoreSettings
    problem: Callable[[Space, Scores], Problem]
    console: Console
    seed: int = 0
    base_kl: float = 0.0
    groups: tuple[Group, ...] = ()
    weigh: TokenWeights = alike

    def __call__(self, space: Space, table_path: Path, identity: str) -> ScoredSpace:
        """Scores all alternatives of `space` that the lens leaves, and saves scored pairs to a file.

        `identity` names everything else that the scores depend on: the parent and the base.
        """
        indexed = IndexedAlternatives.around(space, self.run.base)
        proposed, lens = len(indexed.listed), None
        if self.settings.method == "lens":
            return ScoredSpace(indexed, self._looked(indexed), proposed, self.groups)
        if self.settings.keep_sets:
            looked = self._looked(indexed)
            kept = self._best_sets(indexed, values_of(looked.means()))
            indexed, lens = (
                IndexedAlternatives.around(indexed.keeping(kept), self.run.base),
                looked.values[sorted(kept), :, 0],
            )
        table = ScoreTable.empty(indexed.listed, self.traces, self.weigh)
        if self.settings.method == "adaptive" and self.run.base is None:
            table.lens = lens
        table.stratified = bool(self.groups)
        kept, scored = SavedTable(table, table_path, identity), ScoredSpace(indexed, table, proposed, self.groups)

        def score(alternatives: Sequence[int], traces: Sequence[int]) -> None:
            self.fill(table, alternatives, traces, save=kept.save)
            kept.save(now=True)

        order = in_random_order(self.traces, self.seed)
        if self.settings.method == "exact":
            score(range(len(indexed.listed)), order)
        else:
            for number, traces in self._evidence(indexed, order).items():
                score([number], traces)
            if self.groups:
                score(range(len(indexed.listed)), group_evidence(self.traces, order, self.groups))
                programs = _WithFloors(scored, self.problem)
            else:
                nothing = self.problem(indexed.space, indexed.scores(np.zeros(len(indexed.listed))))
                programs = [RelaxedProgram(nothing.program, indexed.owner)]
            first, draws = self.settings.first, self.settings.draws
            score_adaptively(table, score, programs, first=first, draws=draws, seed=self.seed, base_kl=self.base_kl)
        return scored

    def _evidence(self, indexed: IndexedAlternatives, order: Sequence[int]) -> dict[int, list[int]]:
        """By each window's number, the first traces of `order`, which it is scored on before adaptive scoring."""
        contexts = np.array([longest_context([self.traces[n]]) for n in order])
        found = {}
        for numbers, windows in zip(indexed.attention, indexed.space.windows, strict=True):
            for number, window in zip(numbers, windows, strict=True):
                if number is not None and window is not None:
                    found[number] = list(order[: traces_for_window(contexts, window, self.settings.first)])
        return found

    def fill(
        self,
        table: ScoreTable,
        alternatives: Sequence[int],
        traces: Sequence[int],
        run: Runner | None = None,
        save: Callable[[], None] | None = None,
    ) -> None:
        """Scores alternatives of a table on some of its traces, with `run` or by default exactly."""
        fill = Fill(table, run or self.run, alternatives, traces, self.settings.tokens_per_batch)
        what, work = f"scoring {len(alternatives)} on {len(traces)}", fill.work
        with progress(self.console, what, work) as advance:
            fill(save, advance)

    def _looked(self, indexed: IndexedAlternatives) -> ScoreTable:
        """A table of lens estimates on the first traces."""
        traces = in_random_order(self.traces, self.seed)[:LENS_TRACES]
        run = replace(self.run, base=None)
        lens = fit_lens(
            run, micro_batches([self.traces[n] for n in traces], tokens_per_batch=self.settings.tokens_per_batch)
        )
        table = ScoreTable.empty(indexed.listed, self.traces, self.weigh)
        self.fill(table, range(len(indexed.listed)), traces, lens)
        return table

    def _best_sets(self, indexed: IndexedAlternatives, estimates: np.ndarray) -> set[int]:
        """All numbers but those of expert sets that are worse than `keep_sets` others of their layer and count."""
        dropped = {
            number
            for same in indexed.sets_by_count()
            for number in sorted(same, key=lambda n: estimates[n])[self.settings.keep_sets :]
        }
        return set(range(len(indexed.listed))) - dropped


def traces_for_window(contexts: Int[np.ndarray, "traces"], window: int, first: int) -> int:
    """The least number of first traces that a window is scored on.

    A window changes only the few tokens that look back beyond it. Most traces have none, and would give it a score of 0
    with no standard error, so that it would be chosen and never scored again. Windows are therefore scored on more
    traces than expert sets, of which at least a few are longer than the window.

    Args:
      contexts: the longest context of every trace.
      first: number of traces that expert sets are first scored on.
    """
    longer = np.flatnonzero(contexts > window)[:_LONG_TRACES]
    return min(max(WINDOWS_FIRST * first, int(longer[-1]) + 1 if len(longer) else 0), len(contexts))
