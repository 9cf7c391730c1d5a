"""Limits on the temperatures at which a distribution can be sampled or compared in float32."""

from __future__ import annotations

from math import isfinite

from puzzle_jax.errors import ConfigError

LEAST_TEMPERATURE = 1e-20
"""Logits divided by less than this may overflow float32. Sampling is greedy long before: with noise of a few units, the
choice between two tokens is settled once their logits differ by a few times the temperature."""

GREATEST_TEMPERATURE = 1e6
"""Logits divided by this are practically equal."""

LEAST_LOSS_TEMPERATURE = 1e-3
"""The least temperature of a loss: gradients, which grow as the temperature falls, stay well within float32."""


def check_temperature(name: str, value: float) -> None:
    """Raises ConfigError unless the value is 0, which means greedy, or a temperature up to `GREATEST_TEMPERATURE`.

    Temperatures below `LEAST_TEMPERATURE` are allowed and greedy too (`generate.sampling.Sampling`).
    """
    if not (isfinite(value) and value >= 0):
        raise ConfigError(f"{name} is {value}, but must be a finite number of at least 0")
    if value > GREATEST_TEMPERATURE:
        raise ConfigError(f"{name} is {value}, but must be at most {GREATEST_TEMPERATURE:g}")
