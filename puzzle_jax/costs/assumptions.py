"""The roofline's assumptions about a serving engine: one file of numbers, the same for everything it estimates.

`assumptions.yaml` beside this file holds the numbers and their sources; another file may replace it as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Union

from puzzle_jax.codec import from_plain
from puzzle_jax.errors import check_range
from puzzle_jax.files import read_yaml
from puzzle_jax.numeric import LARGEST, Number

DEFAULT = Path(__file__).parent / "assumptions.yaml"

_Numbers = Mapping[str, Union[Number, "_Numbers"]]
_SHARES = ("usable_memory", "link_efficiency", "bandwidth", "rate")
_COUNTS = ("max_batch", "prefill_tokens", "tile_rows")


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's memory bandwidth and of its matrix rate that a kind of operation reaches, in (0, 1]."""

    bandwidth: Number
    rate: Number


@dataclass(frozen=True)
class Efficiencies:
    """Efficiencies by kind of operation: attention proper, experts, other matrix products, the head."""

    attention: Efficiency
    experts: Efficiency
    dense: Efficiency
    head: Efficiency


@dataclass(frozen=True)
class Operations:
    """Numbers of operations launched for a layer's attention, for its mixture, and for the rest of a step."""

    attention: Number
    experts: Number
    rest: Number


@dataclass(frozen=True)
class Assumptions:
    """Numbers that describe a serving engine; `assumptions.yaml` explains each of them.

    Raises `ConfigError` for a number out of its range.
    """

    usable_memory: Number
    reserve_bytes: Number
    max_batch: int
    prefill_tokens: int
    tile_rows: int
    efficiency: Efficiencies
    link_efficiency: Number
    operations: Operations
    step_seconds: Number
    sampling_passes: Number

    def __post_init__(self) -> None:
        for name, number in _numbers(asdict(self)):
            kind = name.rpartition(".")[2]
            if kind in _SHARES:
                check_range(name, number, 0, 1, above=True)
            else:
                check_range(name, number, 1 if kind in _COUNTS else 0, LARGEST)


def read_assumptions(path: Path | str = DEFAULT) -> Assumptions:
    """Reads a file of assumptions.

    Raises `PuzzleError`, naming file, field and value, if it cannot be used.
    """
    return from_plain(Assumptions, read_yaml(Path(path)), str(path), exact=True)


@cache
def default_assumptions() -> Assumptions:
    return read_assumptions()


def _numbers(values: _Numbers, prefix: str = "") -> Iterator[tuple[str, Number]]:
    """All numbers of nested fields, by dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
