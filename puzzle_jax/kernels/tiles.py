"""Tile sizes by device, operation and size, found by measurement and kept in `tiles.json`.

    {device kind: {operation: [{"up_to": size, name: value, ...}, ...]}}

`python benchmarks/kernels.py --tune` writes the entries of the device that it runs on. An operation's entries are
sorted by `up_to`; the first one that the size does not exceed is used, or else the last. For devices and operations
that are not in the table, kernels compute their own tile sizes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import jax

from puzzle_jax.kernels.platform import lowered_for

TABLE = Path(__file__).with_name("tiles.json")

KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite", "cpu": "cpu"}
"""Devices whose entries are used when a program is lowered for a platform that is not present."""

_given: ContextVar[Mapping[str, Mapping[str, int]] | None] = ContextVar("given", default=None)


def tiles(operation: str, size: float | int, **default: int) -> dict[str, int]:
    """The settings of an operation for a size, with `default` for those that the table does not have."""
    given = (_given.get() or {}).get(operation)
    if given is None:
        entries = _table().get(device_kind(), {}).get(operation, [])
        given = next((entry for entry in entries if size <= entry["up_to"]), entries[-1] if entries else {})
    return {name: int(given.get(name, value)) for name, value in default.items()}


def device_kind() -> str:
    """The kind of the device present, or the one in `KINDS` for the platform that a program is lowered for."""
    platform = lowered_for()
    return jax.local_devices()[0].device_kind if platform is None else KINDS[platform]


@contextmanager
def using(settings: Mapping[str, Mapping[str, int]]) -> Iterator[None]:
    """A context in which these settings replace those of the table. Programs traced earlier keep theirs."""
    token = _given.set(settings)
    try:
        yield
    finally:
        _given.reset(token)


@cache
def _table() -> dict[str, dict[str, list[dict[str, int | float]]]]:
    return json.loads(TABLE.read_text())
