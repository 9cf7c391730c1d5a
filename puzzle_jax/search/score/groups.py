"""Scores of alternatives on groups of traces, sharpened by their scores on all traces, and the parent's entropy there.

An alternative that is scored on few traces has very few of each group. What a group's KL is to the KL over all tokens,
however, is much alike for all alternatives, so the ratio of the two is shrunk towards the typical one:

    ratio = score on the group / score on all = true + noise,    noise ~ N(0, (c typical)^2 / traces)
    true  = typical + rest,                                      rest ~ N(0, spread^2)

c is the relative standard error of one trace, which is pooled over alternatives: that of an alternative's own few
traces is as noisy as their mean and errs with it. The spread is what the ratios vary by beyond that noise, by the
method of moments (R. DerSimonian and N. Laird, Controlled Clinical Trials 7, 1986). Expert sets and windows are fitted
apart, since what a window costs is far more uneven; where there are few, scores stay as they were measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from puzzle_jax.costs.scenario import Group
from puzzle_jax.generate.batches import micro_batches
from puzzle_jax.generate.traces import Trace
from puzzle_jax.search.score.alternatives import IndexedAlternatives
from puzzle_jax.search.score.estimator import kinds_of, post_stratified
from puzzle_jax.search.score.measurements import ScoreTable
from puzzle_jax.search.score.replace_one import Answers, ReplaceOne, parent_choices
from puzzle_jax.search.solve.floors import members

LEAST_TRACES = 8
"""The fewest traces of every limited group that every alternative is scored on, if there are as many."""

_FEWEST = 12
"""The fewest alternatives that a typical ratio and a spread are fitted to."""
_ROUNDS = 20

Values = Float[np.ndarray, "alternatives"]


def group_estimates(
    table: ScoreTable, indexed: IndexedAlternatives, groups: Sequence[Group], overall: Values
) -> dict[str, Values]:
    """The best estimate of every alternative's KL per token on each group's traces, in nats, by name of the group.

    Args:
      table: scores of the alternatives, trace by trace.
      indexed: the same alternatives, told apart as expert sets and windows.
      groups: the groups wanted.
      overall: the best estimates of the KL over all tokens.
    """
    numbers = [number for of_layer in indexed.attention for number in of_layer if number is not None]
    windows = np.isin(np.arange(len(overall)), numbers)
    return {group.name: _estimated(table, group, overall, windows) for group in groups}


def _estimated(table: ScoreTable, group: Group, overall: Values, windows: Bool[np.ndarray, "alternatives"]) -> Values:
    of_group = np.flatnonzero(members(group, table.traces)).tolist()
    times = table.scored[:, of_group].astype(float)
    kinds = kinds_of([(table.traces[n].task, table.traces[n].effort) for n in of_group])
    weights = np.nan_to_num(post_stratified(times, table.tokens[of_group], kinds))
    values = np.nan_to_num(table.values[:, of_group, 0])
    measured = np.sum(weights * values, axis=1)
    squares = np.sum((weights * (values - measured[:, None])) ** 2, axis=1)
    number = times.sum(axis=1)
    estimates = np.where(number > 0, measured, overall)
    for same in (windows, ~windows):
        estimates[same] = shrunk_ratios(measured[same], squares[same], number[same], overall[same], estimates[same])
    return estimates


def shrunk_ratios(measured: Values, squares: Values, number: Values, overall: Values, otherwise: Values) -> Values:
    """Scores on a group, shrunk towards the typical ratio to the scores on all traces.

    Args:
      measured: mean scores on the group's traces.
      squares: sums of the squared weighted deviations from them, that is, squares of their standard errors but for the
        factor n / (n - 1).
      number: traces of the group that each alternative was scored on.
      overall: scores on all traces.
      otherwise: scores of alternatives that cannot be shrunk: where few can, or the score on all traces is 0.
    """
    known = (number > 1) & (overall != 0) & (measured != 0)
    if known.sum() < _FEWEST:
        return otherwise
    ratio, traces = measured[known] / overall[known], number[known]
    # Squared relative error of one trace: the squared relative error of the mean, times the number of traces.
    relative = float(np.median(squares[known] * traces / (traces - 1) / measured[known] ** 2 * traces))
    typical, spread = float(np.median(ratio)), 0.0
    for _ in range(_ROUNDS):
        noise = relative * typical**2 / traces
        weights = 1 / np.maximum(noise + spread, 1e-12)
        typical = float(np.average(ratio, weights=weights))
        spread = max(float(np.average((ratio - typical) ** 2 - noise, weights=weights)), 0.0)
    shrinkable = (overall != 0) & ((measured != 0) | (number == 0))
    noise = relative * typical**2 / np.maximum(number, 1e-12)
    kept = spread / np.maximum(spread + noise, 1e-300) * (number > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = overall * (kept * measured / overall + (1 - kept) * typical)
    return np.where(shrinkable, expected, otherwise)


def group_evidence(traces: Sequence[Trace], order: Sequence[int], groups: Sequence[Group]) -> list[int]:
    """The first traces of `order` that every alternative has to be scored on, so that each group has a few."""
    wanted: set[int] = set()
    for group in groups:
        of_group = members(group, traces)
        wanted |= set([number for number in order if of_group[number]][:LEAST_TRACES])
    return [number for number in order if number in wanted]


def parent_entropies(run: ReplaceOne, traces: Sequence[Trace], groups: Sequence[Group]) -> dict[str, float]:
    """The parent's mean entropy on each group's completion tokens, in nats, by name of the group.

    A final hidden state of zeros gives every token the same probability, so that H = ln(vocabulary) - KL(parent ||
    zeros).
    """
    found = np.zeros(len(traces))
    for batch in micro_batches(traces) if groups else ():
        state = run.embedded(batch)
        for layer, choice in enumerate(parent_choices(run.config)):
            state = run.layer(layer, state, choice, run.config)
        uniform = run.compared(state, 0 * state[:, None], Answers.of(batch))[0, :, 0]
        real = batch.ids >= 0
        found[batch.ids[real]] = np.log(run.config.vocab_size) - uniform[real]
    tokens = np.array([len(trace.completion) for trace in traces])

    def mean(group: Group) -> float:
        of_group = members(group, traces)
        return max(0.0, float(np.average(found[of_group], weights=tokens[of_group])))

    return {group.name: mean(group) for group in groups}
