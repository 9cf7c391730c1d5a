"""Scores of few traces, drawn towards what the lens estimates.

    log measured = log true + noise,   noise ~ N(0, error^2 / measured^2)
    log true = a + b log lens + rest,  rest ~ N(0, spread^2)

a, b and spread are fitted to all alternatives at once, so nothing is assumed of the lens but that its errors are alike
(empirical Bayes, B. Efron and C. Morris, JASA 70, 1975). An alternative that was scored on many traces keeps its score;
of one that was scored on few, an odd answer moves it less. The lens costs a layer and a head for each alternative, so
its look at many traces is nearly free beside exact scores.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_FEWEST = 12
"""Alternatives that three numbers are fitted to."""
_ROUNDS = 3

Values = Float[np.ndarray, "alternatives"]


def shrunk(measured: Values, errors: Values, lens: Values) -> Values:
    """The expected score of every alternative.

    Args:
      measured: means, nats per token.
      errors: their standard errors.
      lens: estimates of the same.

    What is not above zero in all three stays as it was measured, and so does everything where that leaves few.
    """
    known = (measured > 0) & (lens > 0) & (errors > 0) & np.isfinite(errors)
    if known.sum() < _FEWEST:
        return measured
    log, noise = np.log(measured[known]), (errors[known] / measured[known]) ** 2
    columns = np.stack([np.ones_like(log), np.log(lens[known])], axis=1)
    spread = float(np.median(noise))
    line = log
    for _ in range(_ROUNDS):
        weights = 1 / (noise + spread)
        root = np.sqrt(weights)
        line = columns @ np.linalg.lstsq(columns * root[:, None], log * root, rcond=None)[0]
        spread = max(float(np.average((log - line) ** 2 - noise, weights=weights)), 0.0)
    expected = measured.copy()
    expected[known] = np.exp((spread * log + noise * line) / (spread + noise))
    return expected
