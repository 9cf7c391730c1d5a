"""Adaptive scoring: more traces for the scores whose uncertainty could change the integer program's choice.

All alternatives are scored on a few traces first. Then, in every round, the traces are resampled with replacement many
times (a bootstrap by sequence), the relaxed program is solved with each draw's mean scores, and alternatives that some
draws choose and others do not are contested. Only those are scored on further traces, twice as many each round, until
the disagreement between draws matters little or the traces are used up (successive halving, guided by the program
itself). What it matters is measured by the regret: how much lower the score of each draw's own choice is than that of
the choice by the mean scores, averaged over the draws. Draws would never agree on alternatives that are almost equally
good, but then it hardly matters which one is taken.

The relaxation is the linear program with the same limits without integrality. It splits few groups between
alternatives, and is solved in milliseconds. If the program also chooses batches, draws consider only the few
combinations of batches that are best by the mean scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.optimize import linprog

from puzzle_jax.generate.traces import Trace
from puzzle_jax.processes.published import decided
from puzzle_jax.program.library import Limit, Program, lookup
from puzzle_jax.search.score.measurements import ScoreTable

CASES = 4
"""Number of combinations of batches that draws consider."""

REGRET = 0.05
"""Mean regret, as a share of the choice's KL, up to which further traces are not worth their cost."""

RARE = 0.05
"""Share of the draws up to which their choosing an alternative, or leaving it out, is attributed to chance."""

Scorer = Callable[[Sequence[int], Sequence[int]], None]
"""Fills a table, given the numbers of alternatives and the numbers of traces."""


_Rows = tuple[np.ndarray, np.ndarray] | tuple[None, None]


class RelaxedProgram:
    """A program's linear relaxation, for many objectives under the same limits.

    `owner` maps each group's alternatives to the numbers of their scores; None stands for a score known to be 0.
    """

    def __init__(self, program: Program, owner: Mapping[str, Mapping[str, int | None]]) -> None:
        pairs = [(group, name) for group, alternatives in program.library.items() for name in alternatives]
        groups = {group: number for number, group in enumerate(program.library)}
        self.group = np.array([groups[group] for group, _ in pairs])
        numbers = [owner.get(group, {}).get(name) for group, name in pairs]
        self.number = np.array([-1 if number is None else number for number in numbers])
        columns = np.arange(len(pairs))
        self._one_each = sparse.csr_matrix((np.ones(len(pairs)), (self.group, columns)))
        self._cases = [self._rows(program, pairs, program.limits_of(selected)) for selected in program.combinations()]

    @staticmethod
    def _rows(program: Program, pairs: Sequence[tuple[str, str]], limits: Sequence[Limit]) -> _Rows:
        """Limits as rows scaled to a largest coefficient of 1, and their bounds; None without limits."""
        rows, bounds = [], []
        for limit in limits:
            row = np.array([float(lookup(program.library[group][name], limit.key)) for group, name in pairs])
            scale = limit.sign / max(float(np.abs(row).max()), 1e-300)
            rows.append(row * scale)
            bounds.append(float(limit.bound) * scale)
        return (np.stack(rows), np.array(bounds)) if rows else (None, None)

    def narrowed(self, scores: Float[np.ndarray, "alternatives"], most: int) -> RelaxedProgram:
        """The same program with at most `most` of its combinations of limits: the best by the given scores."""
        if len(self._cases) <= most:
            return self
        cost = self._cost(scores)
        values = [np.inf if x is None else float(cost @ x) for x in (self._least(cost, *case) for case in self._cases)]
        program = copy(self)
        program._cases = [self._cases[number] for number in np.argsort(values, kind="stable")[:most]]
        return program

    def choice(self, scores: Float[np.ndarray, "alternatives"]) -> Float[np.ndarray, "columns"]:
        """The share of each alternative in the best relaxed choice; zeros where no choice meets the limits."""
        cost = self._cost(scores)
        found = [self._least(cost, *case) for case in self._cases]
        best = min((x for x in found if x is not None), key=lambda x: float(cost @ x), default=None)
        return np.zeros(len(cost)) if best is None else best

    def total(self, scores: Float[np.ndarray, "alternatives"], choice: Float[np.ndarray, "columns"]) -> float:
        """The sum of the scores of a relaxed choice."""
        return float(np.append(scores, 0.0)[self.number] @ choice)

    def _cost(self, scores: np.ndarray) -> np.ndarray:
        """Scores by column, scaled so that the largest is 1."""
        cost = np.append(scores, 0.0)[self.number]
        return cost / max(float(np.abs(cost).max()), 1e-300)

    def _least(self, cost: np.ndarray, rows: np.ndarray | None, bounds: np.ndarray | None) -> np.ndarray | None:
        """The relaxed choice of least cost under some limits."""
        return linprog(
            cost,
            A_ub=rows,
            b_ub=bounds,
            A_eq=self._one_each,
            b_eq=np.ones(self.group[-1] + 1),
            bounds=(0, 1),
            method="highs",
        ).x


def contested(
    programs: Iterable[RelaxedProgram], table: ScoreTable, *, draws: int = 32, seed: int = 0, base_kl: float = 0.0
) -> list[int]:
    """Numbers of the alternatives that some bootstrap draws of the traces choose and others do not, where that matters.

    There is one program for each target that the scores are to serve; the table has some scores of every alternative.
    `base_kl` is the KL of the model that scores are differences from; 0 for the parent.
    """
    source, found = np.random.default_rng(seed), set()
    used = np.flatnonzero(table.scored.any(axis=0))
    samples = [table.estimates()] + [_redrawn(table, source.choice(used, len(used))) for _ in range(draws)]
    for program in programs:
        program = program.narrowed(samples[0], CASES)
        choices = np.stack([program.choice(scores) for scores in samples])
        regret = [
            program.total(scores, choices[0]) - program.total(scores, choice)
            for scores, choice in zip(samples[1:], choices[1:], strict=True)
        ]
        if np.mean(regret) <= REGRET * (base_kl + program.total(samples[0], choices[0])):
            continue
        share = (choices > 1e-6).mean(axis=0)
        torn = (share > RARE) & (share < 1 - RARE)
        found |= {int(number) for number in program.number[torn] if number >= 0}
    return sorted(found)


def _redrawn(table: ScoreTable, traces: np.ndarray) -> Float[np.ndarray, "alternatives"]:
    """Scores from the drawn traces; from all its scored traces for an alternative that was scored on none of them."""
    scores = table.estimates(traces)
    return np.where(np.isnan(scores), table.estimates(), scores)


def in_random_order(traces: Sequence[Trace], seed: int = 0) -> list[int]:
    """Numbers of traces, ordered so that the first ones hold every task and effort about equally often.

    Sampling in proportion to tokens would rank no better for the same tokens: kinds with long answers weigh more, but
    also cost more.
    """
    source = np.random.default_rng(seed)
    kinds: dict[tuple[str, str], list[int]] = {}
    for number in source.permutation(len(traces)):
        kinds.setdefault((traces[number].task, traces[number].effort), []).append(int(number))
    turns = [(turn, kind, number) for kind, numbers in sorted(kinds.items()) for turn, number in enumerate(numbers)]
    return [number for _, _, number in sorted(turns)]


def score_adaptively(
    table: ScoreTable,
    score: Scorer,
    programs: Iterable[RelaxedProgram],
    *,
    first: int = 16,
    draws: int = 32,
    seed: int = 0,
    base_kl: float = 0.0,
    on_round: Callable[[int, int], None] | None = None,
) -> int:
    """Scores all alternatives on the `first` traces, then contested ones on more; returns the number of traces used.

    `programs` are asked for again in every round, so that their limits may follow the scores. Scores that the table
    already has are not computed again. Before each round `on_round` is called with its numbers of alternatives and
    traces.
    """
    order = in_random_order(table.traces, seed)
    wanted, start, stop = list(range(len(table.alternatives))), 0, min(first, len(order))
    while wanted and start < len(order):
        if on_round is not None:
            on_round(len(wanted), stop - start)
        score(wanted, order[start:stop])
        wanted = decided(partial(contested, programs, table, draws=draws, seed=seed, base_kl=base_kl))
        start, stop = stop, min(2 * stop, len(order))
    return start
