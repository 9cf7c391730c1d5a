"""Estimates scores from few traces, sharpened by what needs no further exact runs: token counts and lens values.

Exact scores on 16 traces are noisy, while the lens, which costs one layer and one head per alternative, has been run on
many. Three steps combine both into one estimate:

    weights      each kind of trace (task and effort) is weighted by its completion tokens among all traces, however
                 many traces of that kind were scored: post-stratification
    correction   score + slope / 2 * (lens on all its traces - lens on the traces scored): the lens is a control
                 variate, and the slope is that of exact values against lens values over the traces scored. It is
                 halved, since a slope fitted to few traces is itself noisy
    shrinkage    log score = log true + noise,   noise ~ N(0, (standard error / score)^2)
                 log true = a + b log lens + offset of the layer + rest,   rest ~ N(0, spread^2)
                 with a, b, offsets and spread fitted to all alternatives at once, so that all that is assumed of the
                 lens is that its errors are alike: empirical Bayes

The first two are textbook survey sampling (W. G. Cochran, Sampling Techniques, 1977, chapters 5A and 7); the third is
from B. Efron and C. Morris, JASA 70, 1975. An alternative scored on many traces keeps its score; the score of one
scored on few is moved less by an unusual answer. docs/results.md shows what each step gains on the embedded parent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float, Int

_FEWEST = 12
"""The fewest alternatives that a line and a spread are fitted to; the layers' offsets have a prior of their own."""
_ROUNDS = 3
_STEEPEST = 3.0
"""The largest slope used by the correction; steeper ones are clipped."""
_LEAST = 0.3
"""The least share of a score that the correction may leave."""

Values = Float[np.ndarray, "alternatives"]
ByTrace = Float[np.ndarray, "alternatives traces"]


def estimate(
    values: ByTrace,
    lens: ByTrace,
    *,
    times: ByTrace,
    tokens: Int[np.ndarray, "traces"],
    kinds: Int[np.ndarray, "traces"],
    layers: Int[np.ndarray, "alternatives"],
) -> Values:
    """The expected score of every alternative, in nats per token.

    Args:
      values: exact scores on each trace; anything where `times` is 0.
      lens: lens estimates of the same, NaN where the lens was not run.
      times: how often each trace counts for each alternative; 0 where it was not scored.
      tokens: completion tokens of each trace.
      kinds: a number for each trace's task and effort.
      layers: the layer of each alternative.
    """
    weights = post_stratified(times, tokens, kinds)
    values = np.where(times > 0, values, 0.0)
    means = np.sum(weights * values, axis=1)
    rest = np.where(times > 0, values - means[:, None], 0.0)
    number = times.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # A trace that is drawn n times has n times its weight.
        squares = np.sum(weights**2 / np.maximum(times, 1) * rest**2, axis=1)
        errors = np.sqrt(squares * number / (number - 1))
    looked = (~np.isnan(lens)).astype(float)
    overall = np.sum(post_stratified(looked, tokens, kinds) * np.nan_to_num(lens), axis=1)
    corrected = means + _correction(rest, lens, weights, overall)
    return shrunk(np.maximum(corrected, _LEAST * means), errors, overall, layers)


def post_stratified(times: ByTrace, tokens: Int[np.ndarray, "traces"], kinds: Int[np.ndarray, "traces"]) -> ByTrace:
    """Weights of the traces, which sum to 1: tokens, scaled so that every kind has its share of all traces' tokens.

    A kind that an alternative was not scored on is left out. The weights of an alternative without traces are NaN.
    """
    of_kind = np.eye(kinds.max() + 1)[kinds]
    weights = times * tokens
    counted = weights @ of_kind
    with np.errstate(invalid="ignore", divide="ignore"):
        raised = np.where(counted > 0, tokens @ of_kind / counted, 0.0)
        weights = weights * raised[:, kinds]
        return weights / weights.sum(axis=1, keepdims=True)


def kinds_of(kinds: Sequence[Hashable]) -> Int[np.ndarray, "traces"]:
    """A number for each different kind, in order of appearance."""
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    return np.array([numbers[kind] for kind in kinds])


def _correction(rest: ByTrace, lens: ByTrace, weights: ByTrace, overall: Values) -> Values:
    """The correction to the mean of each alternative whose scored traces all have lens estimates; 0 for others."""
    looked = ~np.any(np.isnan(lens) & (weights > 0), axis=1)
    seen = np.where(weights > 0, np.nan_to_num(lens), 0.0)
    mean = np.sum(weights * seen, axis=1)
    off = np.where(weights > 0, seen - mean[:, None], 0.0)
    squares = np.sum(weights * off**2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = np.where(squares > 0, np.sum(weights * off * rest, axis=1) / squares, 0.0)
    return np.where(looked, np.clip(slope, 0.0, _STEEPEST) / 2 * (overall - mean), 0.0)


def shrunk(measured: Values, errors: Values, lens: Values, layers: Int[np.ndarray, "alternatives"]) -> Values:
    """Scores shrunk towards those that the lens predicts, in proportion to their uncertainty.

    All values are means in nats per token; `errors` are the standard errors of `measured`. Each layer's offset is
    fitted as if one more alternative of that layer had an offset of 0. An alternative for which any of the three is not
    positive keeps its measured score, and so do all if fewer than `_FEWEST` others are left.
    """
    known = (measured > 0) & (lens > 0) & (errors > 0) & np.isfinite(errors)
    if known.sum() < _FEWEST:
        return measured
    log, noise = np.log(measured[known]), (errors[known] / measured[known]) ** 2
    offsets = np.eye(layers.max() + 1)[layers[known]]
    columns = np.column_stack([np.ones_like(log), np.log(lens[known]), offsets])
    prior = np.column_stack([np.zeros((offsets.shape[1], 2)), np.eye(offsets.shape[1])])
    spread = float(np.median(noise))
    line = log
    for _ in range(_ROUNDS):
        weights = 1 / (noise + spread)
        root = np.sqrt(weights)
        rows = np.vstack([columns * root[:, None], prior * np.sqrt(np.median(weights))])
        line = columns @ np.linalg.lstsq(rows, np.append(log * root, np.zeros(len(prior))), rcond=None)[0]
        spread = max(float(np.average((log - line) ** 2 - noise, weights=weights)), 0.0)
    expected = measured.copy()
    expected[known] = np.exp((spread * log + noise * line) / (spread + noise))
    return expected
