"""What the roofline assumes of a serving engine: one file of numbers, the same for all that it estimates.

`assumptions.yaml` beside this file holds the numbers and where they come from; another file may replace them, whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.files import read_yaml
from puzzle_jax.numeric import Number, is_number

DEFAULT = Path(__file__).parent / "assumptions.yaml"

_SHARES = ("usable_memory", "link_efficiency", "bandwidth", "rate")
_COUNTS = ("max_batch", "prefill_tokens", "tile_rows")


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks that a kind of operation reaches, in (0, 1].

    Attributes:
      bandwidth: of the memory bandwidth.
      rate: of the matrix rate.
    """

    bandwidth: Number
    rate: Number

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Efficiencies:
    """By kind of operation: attention proper, experts, other matrix products, the head."""

    attention: Efficiency
    experts: Efficiency
    dense: Efficiency
    head: Efficiency


@dataclass(frozen=True)
class Operations:
    """How many operations are launched for a layer's attention, for its mixture, and for the rest of a step."""

    attention: Number
    experts: Number
    rest: Number

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Assumptions:
    """Of the engine; `assumptions.yaml` describes every number.

    Attributes:
      usable_memory: share of a device's memory for weights, caches and `reserve_bytes`.
      reserve_bytes: of a device, for activations, compiled graphs and buffers.
      max_batch: requests that run together at most where a scenario leaves its batch open.
      prefill_tokens: prompt tokens of one step.
      tile_rows: to which an expert's rows are rounded up.
      efficiency: by kind of operation.
      link_efficiency: of collectives.
      operations: launched.
      step_seconds: of the host, in every step.
      sampling_passes: over the float32 logits.

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
        _check(self)


def read_assumptions(path: Path | str = DEFAULT) -> Assumptions:
    """Reads a file of assumptions.

    Raises `PuzzleError` that names file, field and value where it cannot be used.
    """
    data = read_yaml(Path(path))
    try:
        return _build(Assumptions, data, "")
    except ConfigError as error:
        raise PuzzleError(f"{path}: {error}") from error


@cache
def default_assumptions() -> Assumptions:
    return read_assumptions()


def _build(kind: Any, value: Any, name: str) -> Any:
    """A (nested) dataclass from a mapping that has exactly its fields."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name or 'the file'} is {value!r}, but must hold fields")
    make: Any = kind  # which is_dataclass narrows to what cannot be called
    hints = get_type_hints(kind)
    prefix = f"{name}." if name else ""
    for field in sorted(map(str, {*hints} ^ {*value})):
        raise ConfigError(f"{prefix}{field} is {'missing' if field in hints else 'no assumption'}")
    parts = {field: _build(hint, value[field], f"{prefix}{field}") for field, hint in hints.items()}
    try:
        return make(**parts)
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _check(value: Any) -> None:
    for field in fields(value):
        number = getattr(value, field.name)
        if is_dataclass(number):
            continue
        finite = is_number(number)
        if field.name in _SHARES:
            holds, rule = finite and 0 < number <= 1, "above 0 and at most 1"
        elif field.name in _COUNTS:
            holds, rule = finite and isinstance(number, int) and number >= 1, "a whole number of at least 1"
        else:
            holds, rule = finite and number >= 0, "a number of at least 0"
        if not holds:
            raise ConfigError(f"{field.name} is {shown(number)}, but must be {rule}")
