"""Costs that were timed elsewhere, in the runtime that will serve, say: a costs.json of our own form.

Such a file is used as it is, once it holds all that the search will ask for. Left out: whether its seconds are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.search.costs import Costs, read_costs, seconds_key
from puzzle_jax.search.scenario import Scenario
from puzzle_jax.search.space import Space

_SHOWN = 4


def read_external(path: Path, space: Space, scenarios: Sequence[Scenario]) -> Costs:
    """Reads a costs.json for a space and scenarios; of further ones that it holds, nothing is taken.

    Raises `PuzzleError` that names the file and what it lacks: layers, expert counts, windows, seconds, a scenario.
    """
    costs = read_costs(path)
    try:
        for scenario in scenarios:
            _check_scenario(costs, scenario)
        check_costs(costs, space)
    except ConfigError as error:
        raise PuzzleError(f"{path}: {error}") from error
    return replace(costs, scenarios=tuple(scenarios))


def _check_scenario(costs: Costs, scenario: Scenario) -> None:
    held = costs.scenario(scenario.name).to_json()
    for field, value in scenario.to_json().items():
        if held[field] != value:
            raise ConfigError(f"{field} of scenario {scenario.name!r} is {held[field]!r}, but {value!r} is asked for")


def check_costs(costs: Costs, space: Space) -> None:
    """Checks that costs, from elsewhere perhaps, hold all that a space asks for.

    Raises `ConfigError` that names the layers' missing expert counts and windows.
    """
    if len(costs.layers) != space.num_layers:
        raise ConfigError(f"the costs are of {len(costs.layers)} layers, but the parent has {space.num_layers}")
    missing = []
    for layer, (held, block) in enumerate(zip(costs.layers, space.parent.blocks, strict=True)):
        counts = {block.num_experts, *space.expert_counts(layer)} - {*held.experts}
        windows = [window for window in space.windows[layer] if window not in held.attention]
        if counts:
            missing.append(f"layer {layer}: expert counts {', '.join(map(str, sorted(counts, reverse=True)))}")
        if windows:
            missing.append(f"layer {layer}: windows {', '.join('full' if w is None else str(w) for w in windows)}")
    if missing:
        more = f"; and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ConfigError(f"the costs lack {'; '.join(missing[:_SHOWN])}{more}")
    keys = [seconds_key(s, batch) for s in costs.scenarios for batch in costs.offered_batches(s.name)]
    tables = [costs.fixed]
    for layer in costs.layers:
        tables += [entry.seconds for entry in (*layer.experts.values(), *layer.attention.values())]
    for key in keys:
        if not all(key in table for table in tables):
            raise ConfigError(f"the costs lack seconds of {key!r} somewhere")
