"""The memory that programs need on a device: one record for searches, distillation and reinforcement learning.

A planner (`plan.search`, `plan.distill`, `plan.grpo`) says which programs there are and which arrays each one holds.
Timing, the table, JSON, and the changes that would make a program fit are here. Nothing here imports JAX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import attrgetter
from typing import TypeVar

from rich.table import Table

from puzzle_jax.errors import ConfigError
from puzzle_jax.files import Json
from puzzle_jax.settings.help import written

GB = 1e9

Recipe = TypeVar("Recipe")


@dataclass(frozen=True)
class Usage:
    """Bytes on one device while a program runs.

    Attributes:
      held: bytes of the arrays that are held, by name.
      temporaries: bytes that XLA allocates beside them.
      arithmetic: the large parts of the temporaries by arithmetic; empty where they were not calculated.
      seconds: seconds that tracing and compiling took.
    """

    held: Mapping[str, int]
    temporaries: int
    arithmetic: Mapping[str, int] = field(default_factory=dict)
    seconds: float = field(default=0.0, compare=False)

    @property
    def held_bytes(self) -> int:
        """Bytes of all arrays that are held."""
        return sum(self.held.values())

    @property
    def total(self) -> int:
        return self.held_bytes + self.temporaries

    @property
    def calculated(self) -> int:
        """The total with temporaries by arithmetic, where there are such figures."""
        return self.held_bytes + (sum(self.arithmetic.values()) if self.arithmetic else self.temporaries)


@dataclass(frozen=True)
class Change:
    """A way to need less memory: in words, as changed fields of the recipe where they are known, and with an estimate
    of the bytes that one device then needs where there is one."""

    what: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    total: int | None = None

    def __str__(self) -> str:
        if self.total is None:
            return self.what
        options = " ".join(f"--{name} {written(value)}" for name, value in self.settings.items())
        return f"{self.what}: {options}: {self.total / GB:.1f} GB"


def compiled(programs: Mapping[str, Callable[[], Usage]]) -> dict[str, Usage]:
    """The usage of every program, found by functions that compile them, with the seconds that this took."""
    found = {}
    for name, program in programs.items():
        began = time.monotonic()
        usage = program()
        found[name] = replace(usage, seconds=time.monotonic() - began)
    return found


@dataclass(frozen=True)
class Plan:
    """The memory that the programs of a run need, and that of the devices.

    Attributes:
      about: lines that name what is planned.
      programs: bytes that each program needs on a device, in order.
      labels: readable names of the arrays in `Usage.held`, in order.
      changes: what would help, by program, for those that do not fit.
      notes: lines that a reader of the figures should know.
    """

    about: Sequence[str]
    programs: Mapping[str, Usage]
    device_bytes: int
    labels: Mapping[str, str]
    changes: Mapping[str, Sequence[Change]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Json]:
        programs = {
            name: {**asdict(usage), "total": usage.total, "fits": usage.total <= self.device_bytes}
            for name, usage in self.programs.items()
        }
        fits = all(program["fits"] for program in programs.values())
        return {**asdict(self), "programs": programs, "fits": fits}

    def table(self) -> Table:
        """A table of GB per device, arrays by program; figures by arithmetic are beside the compiled ones."""
        columns: dict[str, dict[str, int]] = {}
        for name, usage in self.programs.items():
            columns[name] = {**usage.held, "temporaries": usage.temporaries, "total": usage.total}
            if usage.arithmetic:
                parts = {f"  {part}": size for part, size in usage.arithmetic.items()}
                sums = {"temporaries": sum(parts.values()), "total": usage.calculated}
                columns[f"{name} by arithmetic"] = {**usage.held, **parts, **sums}
        parts = [row for column in columns.values() for row in column if row.startswith("  ")]
        memory = "memory of a device"
        table = Table("GB per device", *columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for rows in (list(self.labels), ["temporaries", *parts], ["total", memory]):
            for row in rows:
                sizes = [{**column, memory: self.device_bytes}.get(row, 0) for column in columns.values()]
                if any(sizes):
                    shown = (f"{size / GB:,.3f}" if size else "" for size in sizes)
                    table.add_row(self.labels.get(row, row), *shown)
            table.add_section()
        return table

    def verdict(self) -> list[str]:
        """Returns lines that say whether all programs fit, and for those that do not, what would help."""
        most = max(usage.total for usage in self.programs.values())
        if most <= self.device_bytes:
            return [f"fits: {(self.device_bytes - most) / GB:.1f} GB are left"]
        lines = []
        for name, usage in self.programs.items():
            excess = usage.total - self.device_bytes
            if excess <= 0:
                continue
            line = f"{name} does not fit: {excess / GB:.1f} GB too many"
            if usage.calculated <= self.device_bytes:
                line = f"{name} may fit: {excess / GB:.1f} GB too many as compiled here, but not by arithmetic"
            changes = self.changes.get(name, ())
            if any(change.total is not None for change in changes):
                line += "; each of these should be enough alone, by estimate:"
            else:
                held = f"{usage.held_bytes / GB:.1f} GB are held beside temporaries"
                line += f"; {held}, and no single change is known to be enough{', but these help:' if changes else ''}"
            lines += [line, *(f"  {change}" for change in changes)]
        return lines


# What would have to change --------------------------------------------------------------------------------------------


def least_changes(
    recipe: Recipe, ways: Mapping[str, Iterable[Mapping[str, Json]]], total: Callable[[Recipe], int], limit: int
) -> list[Change]:
    """For each way to need less, the least change that should be enough; ways that cannot do it alone are left out.

    Args:
      ways: changed fields by dotted name, the least change of each way first.
      total: bytes that one device needs with other settings; raises ConfigError for invalid ones.
      limit: memory of a device in bytes.
    """
    found = []
    for what, candidates in ways.items():
        for settings in candidates:
            try:
                needed = total(with_settings(recipe, settings))
            except ConfigError:
                break
            if needed <= limit:
                found.append(Change(what, settings, needed))
                break
    return found


def scaled(recipe: object, halved: Sequence[str] = (), doubled: Sequence[str] = ()) -> Iterator[dict[str, Json]]:
    """Settings by dotted name, the `halved` ones divided by 2, 4, 8 and so on, as long as they are divisible, and the
    `doubled` ones multiplied by the same factor."""
    for factor in (2**power for power in range(1, 11)):
        values = {name: attrgetter(name)(recipe) for name in (*halved, *doubled)}
        if any(values[name] % factor for name in halved):
            return
        yield {name: value // factor if name in halved else value * factor for name, value in values.items()}


def with_settings(recipe: Recipe, settings: Mapping[str, Json]) -> Recipe:
    """The recipe with changed fields in its sections, which are given by dotted name ("data.rows")."""
    sections: dict[str, dict[str, Json]] = {}
    for name, value in settings.items():
        section, _, inner = name.partition(".")
        sections.setdefault(section, {})[inner] = value
    changed = {name: replace(getattr(recipe, name), **values) for name, values in sections.items()}
    return replace(recipe, **changed)  # type: ignore[type-var]
