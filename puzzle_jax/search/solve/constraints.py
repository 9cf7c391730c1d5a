"""Turns a target into limits on sums of an integer program, each with its name and units for messages.

Limits relative to the parent become numbers by the parent's own costs. In a scenario that leaves its batch open, the
constraints that depend on the batch exist once for each batch, beside a limit on memory: the integer program must meet
those of one batch, which it chooses. The parent is given its own best batch there.

    request_seconds(batch) <= batch output_tokens / tokens per second asked for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor, inf, nextafter

from puzzle_jax.costs.provider import Seconds
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.costs.table import Architecture, Costs, seconds_key
from puzzle_jax.numeric import exact, short
from puzzle_jax.program.library import Limit


@dataclass(frozen=True)
class Constraint:
    """One limit of a target.

    Attributes:
      limit: the limit on a sum of the integer program.
      name: its name in messages.
      asked: the value that the target asks for, in the target's unit.
      reached: converts a value of the sum to that unit, rounded so that the constraint is met if the limit is.
    """

    limit: Limit
    name: str
    asked: str
    reached: Callable[[float], str]


def constraints_of(target: Target, costs: Costs, parent: Architecture) -> tuple[Constraint, ...]:
    """The constraints that do not depend on an open batch."""
    constraints = []
    if target.max_expert_bytes_ratio is not None:
        constraints.append(_bytes_ratio("expert_bytes", "", target.max_expert_bytes_ratio, costs.expert_bytes(parent)))
    for scenario in costs.scenarios:
        if (ratio := target.limit("max_kv_bytes_ratio", scenario.name)) is not None:
            of_parent = costs.kv_bytes(parent, scenario.name)
            constraints.append(_bytes_ratio("kv_bytes", f".{scenario.name}", ratio, of_parent, _within(scenario)))
        if scenario.batch is not None:
            constraints += _constraints_at(target, costs, parent, scenario, scenario.batch)
    return tuple(constraints)


def constraints_by_batch(
    target: Target, costs: Costs, parent: Architecture
) -> Mapping[str, Mapping[int, tuple[Constraint, ...]]]:
    """The constraints that must hold together at each batch, for every scenario that leaves its batch open."""
    return {
        scenario.name: {
            batch: (
                _at_most(f"memory_bytes.{seconds_key(scenario, batch)}", costs.room_bytes[scenario.name], scenario),
                *_constraints_at(target, costs, parent, scenario, batch),
            )
            for batch in costs.offered_batches(scenario.name)
        }
        for scenario in costs.scenarios
        if scenario.batch is None
    }


def request_seconds(scenario: Scenario, seconds: Seconds) -> float:
    """Seconds that one part of the model takes for a request: prefill and all decoding steps."""
    return seconds.prefill_seconds + scenario.output_tokens * seconds.decode_seconds


def _constraints_at(
    target: Target, costs: Costs, parent: Architecture, scenario: Scenario, batch: int
) -> list[Constraint]:
    """The constraints that depend on a batch."""
    key, constraints = seconds_key(scenario, batch), []
    tokens = batch * scenario.output_tokens
    if (speedup := target.limit("min_speedup", scenario.name)) is not None:
        of_parent = costs.best_batch(parent, scenario.name)
        rate = of_parent * scenario.output_tokens / _parent_seconds(costs, parent, scenario, of_parent)
        least = tokens / (rate * exact(speedup))
        constraints.append(
            Constraint(
                Limit(f"request_seconds.{key}", at_most=_float_above(least)),
                f"speed-up{_within(scenario)}",
                f"{speedup:g}",
                lambda seconds: _floor(tokens / seconds / float(rate)),
            )
        )
    if (least_rate := target.limit("min_tokens_per_second", scenario.name)) is not None:
        constraints.append(
            Constraint(
                Limit(f"request_seconds.{key}", at_most=_float_above(tokens / exact(least_rate))),
                f"tokens per second{_within(scenario)}",
                f"{least_rate:g}",
                lambda seconds: short(tokens / seconds, -1),
            )
        )
    for of_sum, field in (
        ("prefill_seconds", "max_seconds_to_first_token"),
        ("decode_seconds", "max_seconds_per_token"),
        ("memory_bytes", "max_memory_bytes"),
    ):
        if (value := target.limit(field, scenario.name)) is not None:
            constraints.append(_at_most(f"{of_sum}.{key}", value, scenario))
    return constraints


_WORDS = {
    "prefill_seconds": "seconds to the first token",
    "decode_seconds": "seconds per token",
    "memory_bytes": "memory bytes",
}


def _at_most(key: str, value: int | float, scenario: Scenario) -> Constraint:
    name = _WORDS[key.partition(".")[0]]
    return Constraint(
        Limit(key, at_most=value), f"{name}{_within(scenario)}", f"{value:g}", lambda total: short(total, 1)
    )


def _bytes_ratio(key: str, suffix: str, ratio: int | float, of_parent: int, within: str = "") -> Constraint:
    names = {"expert_bytes": "expert bytes ratio", "kv_bytes": "KV bytes ratio"}
    limit = Limit(key + suffix, at_most=floor(exact(ratio) * of_parent))
    return Constraint(limit, names[key] + within, f"{ratio:g}", lambda total: _ceil(total / of_parent))


def _parent_seconds(costs: Costs, parent: Architecture, scenario: Scenario, batch: int) -> Fraction:
    """The parent's exact sum, as the library gives it, so that a speed-up of 1 is exactly the parent's."""
    key = seconds_key(scenario, batch)
    parts = [costs.fixed[key]]
    for layer, block in enumerate(parent):
        parts.append(costs.experts_of(layer, block).seconds[key])
        parts.append(costs.attention_of(layer, block).seconds[key])
    return sum((exact(request_seconds(scenario, part)) for part in parts), Fraction(0))


def _within(scenario: Scenario) -> str:
    return f" in scenario {scenario.name!r}"


def _float_above(value: Fraction) -> float:
    """The nearest float whose written decimal is not below the fraction."""
    number = float(value)
    return number if exact(number) >= value else nextafter(number, inf)


def _floor(value: float) -> str:
    return f"{floor(value * 1000) / 1000:g}"


def _ceil(value: float) -> str:
    return f"{-floor(-value * 1000) / 1000:g}"
