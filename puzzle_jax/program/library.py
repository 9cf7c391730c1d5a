"""The parts of an integer program: a library {group: {alternative: {nested numbers}}}, limits on sums, disjunctions
of limits, and solutions.

A group is anything for which one alternative must be chosen: a layer, or one sub-block of a layer. Numbers are named by
dotted keys ("stats.runtime_ms"), the form in which block libraries are published. Sums are exact: every number counts
as the decimal fraction that it is written as, so 0.1 + 0.2 meets a limit of 0.3.

This module knows nothing about models or about solving, which is left to `puzzle_jax.program.solve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import product

from puzzle_jax.errors import PuzzleError, shown
from puzzle_jax.files import Json
from puzzle_jax.numeric import LARGEST, Number, exact, is_number, short

_KEYS_SHOWN = 20

# {group: {alternative: {nested numbers}}}; `Program` checks it.
Library = Mapping[str, Json]


@dataclass(frozen=True)
class Limit:
    """A bound on the sum of `key` over the chosen alternatives: exactly one of `at_most` and `at_least`."""

    key: str
    at_most: Number | None = None
    at_least: Number | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise PuzzleError(f"the limit on {self.key!r} needs one of at_most and at_least")
        if not is_number(self.bound):
            raise PuzzleError(f"the limit on {self.key!r} is {shown(self.bound)}, but must be a finite number")

    @property
    def bound(self) -> Number:
        return self.at_least if self.at_most is None else self.at_most  # pyright: ignore[reportReturnType]

    @property
    def sign(self) -> int:
        """+1 where less is better, -1 where more is."""
        return -1 if self.at_most is None else 1

    def is_met(self, total: Fraction) -> bool:
        return self.sign * total <= self.sign * exact(self.bound)

    def excess(self, total: Fraction) -> float:
        """The amount by which a sum violates the limit, relative to the limit; absolute for a limit of 0."""
        bound = exact(self.bound)
        return float(max(Fraction(0), self.sign * (total - bound)) / (abs(bound) or 1))

    def __str__(self) -> str:
        return f"{self.key!r} at {'most' if self.at_most is not None else 'least'} {short(self.bound, 0)}"


@dataclass(frozen=True)
class Disjunction:
    """Sets of limits by name: all limits of at least one set have to hold, and the solver chooses which.

    This makes a scenario's batch a choice: each batch has its own limits on seconds and memory.
    """

    name: str
    sets: Mapping[str, tuple[Limit, ...]]

    def __post_init__(self) -> None:
        if not self.sets:
            raise PuzzleError(f"{self.name!r} has no sets of limits, but needs at least one")


@dataclass(frozen=True)
class Solution:
    """One choice.

    Attributes:
      choice: chosen alternative of each group.
      score: sum of the minimised key.
      costs: sum of every key that all alternatives of the library have.
      status: "optimal" (proven to the gap asked for), "time limit" (a feasible point, `gap` says how far from
        proven), or "given" (not solved for).
      gap: (score - proven lower bound) / |score|; None where nothing is proven.
      violated: limits that the choice violates; empty in what `solve` returns.
      selected: for each disjunction by name, which of its sets the choice meets, or violates least.
    """

    choice: dict[str, str]
    score: float
    costs: dict[str, float]
    status: str
    gap: float | None
    violated: tuple[Limit, ...] = ()
    selected: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """An integer program: a library, the key to minimise, and limits.

    Raises `PuzzleError` if the library is empty, a key is unknown or missing in an alternative, a value that is used
    is not a finite number (a string, NaN, infinity), or two disjunctions have the same name.
    """

    library: Library
    minimize: str
    limits: tuple[Limit | Disjunction, ...] = ()

    def __post_init__(self) -> None:
        if not self.library:
            raise PuzzleError("the library is empty, but needs at least one group")
        for group, alternatives in self.library.items():
            if not isinstance(alternatives, Mapping) or not alternatives:
                raise PuzzleError(
                    f"group {shown(group)} of the library has no alternatives: it is {shown(alternatives)}"
                )
        names = [each.name for each in self.disjunctions]
        if len(set(names)) < len(names):
            raise PuzzleError(f"the names of the sets of limits are {names}, but must differ")
        used = dict.fromkeys([self.minimize, *(limit.key for limit in self.all_limits)])
        for group, alternatives in self.library.items():
            for name, numbers in alternatives.items():
                for key in used:
                    value = lookup(numbers, key)
                    if not is_number(value):
                        raise PuzzleError(self._complaint(group, name, key, value))

    @property
    def plain_limits(self) -> tuple[Limit, ...]:
        """The limits that must always hold."""
        return tuple(limit for limit in self.limits if isinstance(limit, Limit))

    @property
    def disjunctions(self) -> tuple[Disjunction, ...]:
        return tuple(limit for limit in self.limits if isinstance(limit, Disjunction))

    @cached_property
    def all_limits(self) -> tuple[Limit, ...]:
        """Plain limits and those of all sets of the disjunctions, in order."""
        sets = [[(limit,)] if isinstance(limit, Limit) else limit.sets.values() for limit in self.limits]
        return tuple(limit for each in sets for limits in each for limit in limits)

    def combinations(self) -> list[dict[str, str]]:
        """Every way to select one set of each disjunction."""
        names = [each.name for each in self.disjunctions]
        selections = product(*(each.sets for each in self.disjunctions))
        return [dict(zip(names, selected, strict=True)) for selected in selections]

    def select(self, choice: Mapping[str, str]) -> dict[str, str]:
        """For each disjunction, the first of the sets that a choice violates least, by summed relative excess."""

        def excess(limits: Sequence[Limit]) -> float:
            return sum(limit.excess(self.totals(choice, limit.key)) for limit in limits)

        return {each.name: min(each.sets, key=lambda name: excess(each.sets[name])) for each in self.disjunctions}

    def limits_of(self, selected: Mapping[str, str]) -> tuple[Limit, ...]:
        """The limits that must hold with a selected set of each disjunction."""
        nested = [each.sets[selected[each.name]] for each in self.disjunctions]
        return self.plain_limits + tuple(limit for limits in nested for limit in limits)

    def _complaint(self, group: str, name: str, key: str, value: object) -> str:
        at = f"{shown(name)} in group {shown(group)}"
        if value is not None:
            too_large = isinstance(value, int | float) and not isinstance(value, bool) and value == value
            largest = f" of at most {LARGEST:g} in size" if too_large else ""
            return f"{key!r} of {at} is {shown(value)}, but must be a finite number{largest}"
        known = [known if known.isprintable() else repr(known) for known in self.keys]
        more = f" and {len(known) - _KEYS_SHOWN} more" if len(known) > _KEYS_SHOWN else ""
        return f"{at} has no {key!r}; keys that all alternatives have: {', '.join(known[:_KEYS_SHOWN]) or 'none'}{more}"

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys that every alternative has as a finite number, sorted."""
        return tuple(sorted(common_keys(self.library)))

    @cached_property
    def _exact(self) -> dict[tuple[str, str, str], Fraction]:
        """Cache of exact numbers by group, alternative and key, filled on demand."""
        return {}

    def totals(self, choice: Mapping[str, str], key: str) -> Fraction:
        """The exact sum of `key` over a choice."""
        total = Fraction(0)
        for group, alternative in choice.items():
            at = (group, alternative, key)
            if at not in self._exact:
                self._exact[at] = exact(lookup(self.library[group][alternative], key))
            total += self._exact[at]
        return total


def lookup(numbers: Json, key: str) -> Json:
    """The value at a dotted key of nested mappings, None if there is none; keys may contain dots themselves."""
    if not isinstance(numbers, Mapping):
        return None
    if key in numbers:
        return numbers[key]
    for at in range(len(key)):
        if key[at] == "." and key[:at] in numbers:
            found = lookup(numbers[key[:at]], key[at + 1 :])
            if found is not None:
                return found
    return None


def common_keys(library: Library) -> set[str]:
    """Dotted keys under which every alternative of the library has a finite number."""
    return set.intersection(
        *(set(_numeric_keys(numbers)) for alternatives in library.values() for numbers in alternatives.values())
    )


def _numeric_keys(numbers: object, prefix: str = "") -> Iterator[str]:
    for key, value in numbers.items() if isinstance(numbers, Mapping) else ():
        if isinstance(value, Mapping):
            yield from _numeric_keys(value, f"{prefix}{key}.")
        elif is_number(value):
            yield f"{prefix}{key}"
