"""Scores of alternatives on groups of traces, sharpened by their scores on all traces, and the parent's entropy there.

An alternative that is scored on few traces has very few of each group. A group's score is therefore the best estimate
of the score on all traces (`search.score.estimator`), times the ratio of the two means over the traces scored, and that
ratio is shrunk towards the one that is typical of all alternatives:

    ratio = mean of the group / mean of all = true + noise,    noise ~ N(0, (c typical)^2 / traces)
    true  = typical + rest,                                    rest ~ N(0, spread^2)

c is the relative standard error of one trace, which is pooled over alternatives: that of an alternative's own few
traces is as noisy as their mean and errs with it. The spread is what the ratios vary by beyond that noise, by the
method of moments (R. DerSimonian and N. Laird, Controlled Clinical Trials 7, 1986). Expert sets and windows are fitted
apart, since what a window costs is far more uneven; where there are few, ratios stay as they were measured.
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
"""Rounds in which the typical ratio and the spread, which weigh each other, are fitted in turn."""

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
    kinds = kinds_of([(trace.task, trace.effort) for trace in table.traces])
    values, times = np.nan_to_num(table.values[..., 0]), table.scored.astype(float)
    everywhere = np.sum(post_stratified(times, table.tokens, kinds) * values, axis=1)
    times = times * members(group, table.traces)
    weights = np.nan_to_num(post_stratified(times, table.tokens, kinds))
    means = np.sum(weights * values, axis=1)
    squares = np.sum((weights * (values - means[:, None])) ** 2, axis=1)
    estimates = np.empty(len(overall))
    for same in (windows, ~windows):
        estimates[same] = overall[same] * shrunk_ratios(
            means[same], squares[same], times[same].sum(axis=1), everywhere[same]
        )
    return estimates


def shrunk_ratios(means: Values, squares: Values, number: Values, everywhere: Values) -> Values:
    """Ratios of the scores on a group to those on all traces, shrunk towards the typical ratio.

    An alternative whose group has a mean of 0 keeps the ratio 0, since a window that covers all of the group's traces
    changes nothing there. Where the mean over all traces is 0 the ratio is 1.

    Args:
      means: mean scores on the group's traces.
      squares: sums of the squared weighted deviations from them, which are the squares of their standard errors but for
        a factor n / (n - 1).
      number: traces of the group that each alternative was scored on.
      everywhere: mean scores on all traces that each was scored on.
    """
    defined = everywhere != 0
    ratio = np.where(number > 0, means / np.where(defined, everywhere, 1.0), 1.0)
    ratio[~defined] = 1.0
    known = defined & (number > 1) & (means != 0)
    if known.sum() < _FEWEST:
        return ratio
    seen, traces = ratio[known], number[known]
    # Squared relative error of one trace: that of the mean, times the number of traces.
    relative = float(np.median(squares[known] * traces / (traces - 1) / means[known] ** 2 * traces))
    typical, spread = float(np.median(seen)), 0.0
    for _ in range(_ROUNDS):
        noise = relative * typical**2 / traces
        weights = 1 / np.maximum(noise + spread, 1e-12)
        typical = float(np.average(seen, weights=weights))
        spread = max(float(np.average((seen - typical) ** 2 - noise, weights=weights)), 0.0)
    kept = spread / np.maximum(spread + relative * typical**2 / np.maximum(number, 1), 1e-300)
    shrunk = np.where(number > 0, kept * ratio + (1 - kept) * typical, typical)
    return np.where(defined & ((means != 0) | (number == 0)), shrunk, ratio)


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
