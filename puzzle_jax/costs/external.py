"""Costs that were timed elsewhere, for example in the serving runtime, given as a costs.json in our own format.

Such a file is used as it is if it holds all that the search will ask for. Left out: any check that its seconds are
accurate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from puzzle_jax.config import window_name
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.compute import Offer, kv_bytes, mixture_size, shared_size
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.costs.table import Costs, read_costs
from puzzle_jax.errors import ConfigError, PuzzleError

_SHOWN = 4


def read_external(path: Path, offer: Offer, scenarios: Sequence[Scenario], form: Form) -> Costs:
    """Reads a costs.json; what it holds beyond the offer and the scenarios is ignored.

    Raises `PuzzleError`, naming the file, if it lacks something (layers, expert counts, windows, seconds, a scenario
    with equal fields), has an invalid number or bytes that are not the model's in that form, or has an architecture
    that takes no time to serve.
    """
    costs = read_costs(path)
    try:
        for scenario in scenarios:
            _check_scenario(costs, scenario)
        check_costs(costs, offer)
        _check_sizes(costs, offer, scenarios, form)
        _check_time(costs, scenarios)
    except ConfigError as error:
        raise PuzzleError(f"{path}: {error}") from error
    return replace(costs, scenarios=tuple(scenarios))


def _check_scenario(costs: Costs, scenario: Scenario) -> None:
    held = asdict(costs.scenario(scenario.name))
    for field, value in asdict(scenario).items():
        if held[field] != value:
            raise ConfigError(f"{field} of scenario {scenario.name!r} is {held[field]!r}, but {value!r} is asked for")


def _check_sizes(costs: Costs, offer: Offer, scenarios: Sequence[Scenario], form: Form) -> None:
    """Raises `ConfigError` if bytes or parameters are not those of the parent and its alternatives."""
    config = offer.config

    def check(name: str, held: int | None, value: int) -> None:
        if held != value:
            raise ConfigError(f"{name} is {held}, but the model has {value}")

    shared_bytes, shared_parameters = shared_size(config, form)
    check("shared_bytes", costs.shared_bytes, shared_bytes)
    check("shared_parameters", costs.shared_parameters, shared_parameters)
    sizes = {count: mixture_size(config, count, form) for layer in costs.layers for count in layer.experts}
    for number, layer in enumerate(costs.layers):
        for count, entry in layer.experts.items():
            weight_bytes, parameters = sizes[count]
            check(f"layer {number}, expert count {count}: weight_bytes", entry.weight_bytes, weight_bytes)
            check(f"layer {number}, expert count {count}: parameters", entry.parameters, parameters)
        for window, entry in layer.attention.items():
            for scenario in scenarios:
                name = f"layer {number}, window {window_name(window)}: kv_bytes of scenario {scenario.name!r}"
                check(name, entry.kv_bytes.get(scenario.name), kv_bytes(config, window, scenario))


def _check_time(costs: Costs, scenarios: Sequence[Scenario]) -> None:
    """Raises `ConfigError` if some architecture would take no time at all."""
    for key in costs.seconds_keys(scenarios):
        for field in ("prefill_seconds", "decode_seconds"):
            least = getattr(costs.fixed[key], field)
            for layer in costs.layers:
                least += min(getattr(entry.seconds[key], field) for entry in layer.experts.values())
                least += min(getattr(entry.seconds[key], field) for entry in layer.attention.values())
            if not least > 0:
                raise ConfigError(f"{field} of {key!r} is 0 in all parts of an architecture, but serving it takes time")


def check_costs(costs: Costs, offer: Offer) -> None:
    """Raises `ConfigError`, naming expert counts and windows by layer, if the costs do not cover an offer."""
    if len(costs.layers) != offer.config.num_layers:
        raise ConfigError(f"the costs are of {len(costs.layers)} layers, but the parent has {offer.config.num_layers}")
    missing = []
    for layer, (held, block) in enumerate(zip(costs.layers, offer.config.blocks, strict=True)):
        counts = {block.num_experts, *offer.counts[layer]} - {*held.experts}
        windows = [window for window in offer.windows[layer] if window not in held.attention]
        if counts:
            missing.append(f"layer {layer}: expert counts {', '.join(map(str, sorted(counts, reverse=True)))}")
        if windows:
            missing.append(f"layer {layer}: windows {', '.join(map(window_name, windows))}")
    if missing:
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ConfigError(f"the costs lack {'; '.join(missing[:_SHOWN])}{more}")
    tables = [costs.fixed]
    for layer in costs.layers:
        tables += [entry.seconds for entry in (*layer.experts.values(), *layer.attention.values())]
    for key in costs.seconds_keys(costs.scenarios):
        if not all(key in table for table in tables):
            raise ConfigError(f"the costs lack seconds of {key!r} somewhere")
