"""The KL to expect of a chosen child on fresh traces, from predictions and measurements that both err.

A child's predicted KL, the sum of its alternatives' scores, is too low for two reasons. The program prefers
alternatives whose scores err downwards (the optimiser's curse: J. E. Smith and R. L. Winkler, Management Science 52,
2006), and cuts in several layers harm each other, which no sum sees. Running the pool whole on fresh traces tells both,
but the best of a pool by a noisy measurement is chosen for its luck once more.

Each child's KL is therefore estimated from both (empirical Bayes: B. Efron and C. Morris, JASA 70, 1975):

    measured = true + noise                  noise: what varies from trace to trace and differs between children
    true     = ratio * predicted + rest      one ratio for the pool; rest ~ N(0, spread^2)

The spread is what the measurements vary by around the line beyond their noise. If that is nothing, the estimates are
the line itself, and the order of the predictions decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from puzzle_jax.evaluate.statistics import weighted_mean


def expected_kls(
    predicted: Sequence[float], kl: Float[np.ndarray, "children traces"], tokens: Int[np.ndarray, "traces"]
) -> Float[np.ndarray, "children"]:
    """The expected KL of every child of a pool, in nats per token.

    Args:
      predicted: sums of scores.
      kl: KL per token of each child on every trace.
      tokens: completion tokens of every trace.

    A child without a positive prediction keeps its measurement; so do all of a pool with fewer than three others, or
    with a single trace.
    """
    sums = np.asarray(predicted, float)
    measured = np.array([weighted_mean(of_child, tokens)[0] for of_child in kl])
    known = sums > 0
    if known.sum() < 3 or kl.shape[1] < 2:
        return measured
    common = kl[known].mean(axis=0)
    # What the children have in common, harder or easier traces, moves them together and chooses none of them.
    own = np.array([weighted_mean(of_child - common, tokens)[1] for of_child in kl[known]])
    ratio = measured[known].sum() / sums[known].sum()
    line = ratio * sums[known]
    spread = max(float(np.mean((measured[known] - line) ** 2 - own**2)), 0.0)
    kept = spread / np.maximum(spread + own**2, 1e-300)
    expected = measured.copy()
    expected[known] = line + kept * (measured[known] - line)
    return expected


def expected_of_child(
    luck: float,
    validation: tuple[Float[np.ndarray, "traces"], Int[np.ndarray, "traces"]],
    confirmation: tuple[Float[np.ndarray, "others"], Int[np.ndarray, "others"]],
) -> dict[str, float]:
    """The KL to expect of the final child, and its standard error, in nats per token.

    It is the mean over both sets of traces on which it was run whole, with the KL on the validation traces raised by
    what the choice by them is expected to have gained by luck.

    Args:
      luck: expected less measured KL of the child that a pool chose on the validation traces.
      validation, confirmation: KL of the final child on each trace, and the completion tokens of the traces.
    """
    kl = np.concatenate([validation[0] + luck, confirmation[0]])
    mean, error = weighted_mean(kl, np.concatenate([validation[1], confirmation[1]]))
    return {"kl": mean, "kl_se": error}
