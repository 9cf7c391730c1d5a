"""Interfaces through which `costs` obtains seconds, and bounds on the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import check_range
from puzzle_jax.numeric import Number

LONGEST_SECONDS = 1e12
"""Longer than any part of a model takes; beyond it, sums of costs can no longer be told apart."""


@dataclass(frozen=True)
class Seconds:
    """Seconds of one part of the model for a scenario's whole batch: prefill of all inputs, and one decoding step as
    the mean over output positions. Errors are the relative standard errors of a whole model of such layers where its
    time was measured, else 0."""

    prefill_seconds: Number
    decode_seconds: Number
    prefill_error: Number = 0.0
    decode_error: Number = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_range(name, value, 0, LONGEST_SECONDS)


@dataclass(frozen=True)
class Times:
    """Seconds of every distinct sub-block in one scenario, and of the rest (embedding, head, sampling)."""

    experts: Mapping[int, Seconds]
    attention: Mapping[int | None, Seconds]
    fixed: Seconds


@runtime_checkable
class Provider(Protocol):
    """A source of seconds."""

    @property
    def name(self) -> str: ...

    def device(self, scenario: Scenario) -> str:
        """Returns the name of the device that the seconds are for."""
        ...

    def times(
        self,
        config: ModelConfig,
        scenario: Scenario,
        form: Form,
        counts: Sequence[int],
        windows: Sequence[int | None],
    ) -> Times:
        """Returns seconds of the mixture at each expert count and of attention with each window.

        `form` is how the checkpoint stores the experts that are read.
        """
        ...


@runtime_checkable
class Memory(Protocol):
    """Bounds on the batch of a scenario that leaves it open."""

    def room_bytes(self, scenario: Scenario) -> int:
        """Memory of all devices for weights and caches."""
        ...

    def max_batch(self, scenario: Scenario) -> int:
        """Most requests that the engine runs together."""
        ...
