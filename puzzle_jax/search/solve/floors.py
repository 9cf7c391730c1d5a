"""Floors: limits on the KL of groups of traces, as limits of the integer program and as checks of measured KLs.

For the integer program a group's KL is the sum of its alternatives' scores on the group's traces, as the KL over all
tokens is the sum of their scores on all. The limit "at most x times the mean" is linear in both:

    sum_a (score_group[a] - x score[a]) <= 0

A limit of 0 has no relative excess, by which heuristics and elastic solves measure how far off a choice is, so the same
constant is added to both sides: x times the KL of an average architecture. For scores around a child, which are
differences from its KL, the child's own KL of each group is added.

Sums of scores only approximate KLs, and mostly from below. Whether a child keeps its floors is therefore decided by
measured KLs (`MeasuredFloors`), and a floor that is violated by them is tightened for the next solution
(`search.refine.floors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from puzzle_jax.costs.scenario import Group, KlLimit
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.batches import TokenWeights, alike
from puzzle_jax.generate.traces import Trace
from puzzle_jax.numeric import short
from puzzle_jax.program.library import Limit
from puzzle_jax.search.solve.constraints import Constraint

ALL = "*"
"""The name under which the KL over all tokens is kept beside those of groups."""

KL, ABOVE_MEAN = "kl", "kl_above_mean"
"""Sections of an alternative's numbers: KLs by group, and those less a multiple of the mean."""


@dataclass(frozen=True)
class Floor:
    """One limit on the KL of a group.

    Attributes:
      limit: the limit as the target has it.
      entropy: the parent's mean entropy on the group's completion tokens, in nats; 1 for limits not relative to it.
      tightened: factor by which the integer program's limit is lower than the target's.
      base: KL of the group that scores are differences from, and `base_mean` that over all tokens; 0 for the parent.
    """

    limit: KlLimit
    entropy: float = 1.0
    tightened: float = 1.0
    base: float = 0.0
    base_mean: float = 0.0

    @property
    def group(self) -> str:
        return self.limit.group.name

    @property
    def of_mean(self) -> bool:
        return self.limit.form == "times_mean"

    @property
    def value(self) -> float:
        """The integer program's limit: nats per token, or times the mean."""
        return float(self.limit.value) * self.entropy * self.tightened

    @property
    def asked(self) -> str:
        """The target's limit in words."""
        forms = {
            "nats": "{:g}",
            "times_mean": "{:g} times the mean",
            "share_of_entropy": "{:g} of the parent's entropy",
        }
        return forms[self.limit.form].format(self.limit.value)

    def ratio(self, kls: Mapping[str, float]) -> float:
        """A measured KL of the group over the target's limit: the floor holds up to 1."""
        bound = float(self.limit.value) * self.entropy * (kls[ALL] if self.of_mean else 1.0)
        return kls[self.group] / bound if bound > 0 else np.inf if kls[self.group] > 0 else 0.0

    def words(self, kls: Mapping[str, float], where: str) -> str:
        """The sentence that names a violated floor, with the KL that was measured."""
        kl, mean = short(kls[self.group], 1), f" (mean {short(kls[ALL], 0)})" if self.of_mean else ""
        return f"KL of {self.group} on {where} traces is {kl}{mean}, asked for at most {self.asked}"

    def constraint(self, typical: float) -> Constraint:
        """The limit on the integer program's sums; `typical` is the predicted KL of an average architecture."""
        if self.of_mean:
            constant = self.constant(typical)
            return Constraint(
                Limit(f"{ABOVE_MEAN}.{self.group}", at_most=constant),
                f"predicted KL of {self.group} above {self.value:g} times the mean",
                "0",
                lambda total: short(total - constant, 1),
            )
        return Constraint(
            Limit(f"{KL}.{self.group}", at_most=self.value),
            f"predicted KL of {self.group}",
            f"{self.value:g}",
            lambda total: short(total, 1),
        )

    def constant(self, typical: float) -> float:
        """The constant on both sides of a limit relative to the mean."""
        return self.value * (self.base_mean + typical) or 1.0


def floor_numbers(floors: Sequence[Floor], score: float, groups: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """An alternative's numbers for floors, from its score and its scores by group; empty without floors."""
    if not floors:
        return {}
    above = {floor.group: groups[floor.group] - floor.value * score for floor in floors if floor.of_mean}
    return {KL: {floor.group: groups[floor.group] for floor in floors}, ABOVE_MEAN: above}


def shared_numbers(floors: Sequence[Floor], typical: float) -> dict[str, dict[str, float]]:
    """The numbers that every choice has in common: the base's KL, and constants; empty without floors."""
    if not floors:
        return {}
    above = {
        floor.group: floor.constant(typical) + floor.base - floor.value * floor.base_mean
        for floor in floors
        if floor.of_mean
    }
    return {KL: {floor.group: floor.base for floor in floors}, ABOVE_MEAN: above}


def floors_of(
    limits: Sequence[KlLimit], entropy: Mapping[str, float], base: Mapping[str, float] | None = None
) -> tuple[Floor, ...]:
    """Floors for limits.

    Args:
      limits: the limits of a target.
      entropy: the parent's mean entropy by group, in nats per token; needed for limits relative to it.
      base: KLs by group, and over all tokens, of the child that scores are differences from; None for the parent.

    Raises `ConfigError` for a limit relative to an entropy of 0.
    """
    floors = []
    for limit in limits:
        name = limit.group.name
        of_parent = entropy[name] if limit.form == "share_of_entropy" else 1.0
        if of_parent <= 0:
            raise ConfigError(
                f"target.max_kl.share_of_entropy limits {name}, on which the parent's entropy is 0; use nats for it"
            )
        own, mean = (0.0, 0.0) if base is None else (base[name], base[ALL])
        floors.append(Floor(limit, of_parent, base=own, base_mean=mean))
    return tuple(floors)


def members(group: Group, traces: Sequence[Trace]) -> Bool[np.ndarray, "traces"]:
    """Returns which traces belong to a group."""
    return np.array([group.holds(trace.task, trace.effort) for trace in traces], bool)


def check_members(limits: Sequence[KlLimit], traces: Sequence[Trace], name: str) -> None:
    """Raises `ConfigError` if a set of traces has none of a limited group."""
    for limit in limits:
        if not members(limit.group, traces).any():
            raise ConfigError(
                f"target.max_kl.{limit.form} limits {limit.group.name}, but the {name} traces have none of it; give "
                "more traces, or leave the limit out"
            )


@dataclass(frozen=True)
class MeasuredFloors:
    """Floors that are checked by KLs measured on one set of traces.

    Attributes:
      floors: the floors.
      where: name of the set of traces.
      tokens: completion tokens of every trace, by their weights.
      groups: by name of a limited group, which traces belong to it.
    """

    floors: tuple[Floor, ...]
    where: str
    tokens: Int[np.ndarray, "traces"]
    groups: Mapping[str, Bool[np.ndarray, "traces"]]

    @staticmethod
    def on(floors: Sequence[Floor], traces: Sequence[Trace], where: str, weigh: TokenWeights = alike) -> MeasuredFloors:
        """The check of floors on a set of traces, whose completion tokens have weights."""
        tokens = np.array([weigh(trace).sum() for trace in traces])
        groups = {floor.group: members(floor.limit.group, traces) for floor in floors}
        return MeasuredFloors(tuple(floors), where, tokens, groups)

    def kls(self, kl: Float[np.ndarray, "traces"]) -> dict[str, float]:
        """KL per token by group, and over all tokens, of a child's KL on every trace."""
        weights = {ALL: np.ones(len(self.tokens), bool), **self.groups}
        return {name: float(np.average(kl[of], weights=self.tokens[of])) for name, of in weights.items()}

    def violated(self, kls: Mapping[str, float]) -> tuple[Floor, ...]:
        """The floors that do not hold."""
        return tuple(floor for floor in self.floors if floor.ratio(kls) > 1)

    def words(self, kls: Mapping[str, float]) -> tuple[str, ...]:
        """A sentence for every floor that does not hold."""
        return tuple(floor.words(kls, self.where) for floor in self.violated(kls))

    def excess(self, kls: Mapping[str, float]) -> float:
        """Summed relative excess over the floors."""
        return sum((floor.ratio(kls) - 1 for floor in self.violated(kls)), 0.0)

    def broken(self, new: Float[np.ndarray, "traces"], old: Float[np.ndarray, "traces"]) -> tuple[str, ...]:
        """A sentence for every floor that held for the old child and does not for the new one."""
        new_kls, held = self.kls(new), set(self.floors) - set(self.violated(self.kls(old)))
        return tuple(floor.words(new_kls, self.where) for floor in self.violated(new_kls) if floor in held)


def tightened(floors: Sequence[Floor], measured: MeasuredFloors, kls: Mapping[str, float]) -> tuple[Floor, ...]:
    """Floors whose limits are lowered, where a candidate's measured KLs violate them, by bound over measured KL."""
    ratios = {floor.limit: floor.ratio(kls) for floor in measured.violated(kls)}
    return tuple(replace(floor, tightened=floor.tightened / ratios.get(floor.limit, 1.0)) for floor in floors)
