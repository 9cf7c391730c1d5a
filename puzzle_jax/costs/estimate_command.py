"""`puzzle search estimate --model A --baseline B --scenario NAME|FILE,... [--json]`.

A and B are checkpoint directories or config.json files; weights need not be there, and JAX is not imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.describe import config_path
from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.costs.assumptions import DEFAULT, read_assumptions
from puzzle_jax.costs.deployments import get_scenario, scenario_names
from puzzle_jax.costs.estimate import Architecture, Comparison, Estimate, compare
from puzzle_jax.costs.roofline import PARTS, Roofline
from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.files import Json, parse_json, read_text
from puzzle_jax.numeric import Number, is_number


@dataclass(frozen=True)
class EstimateSettings:
    """One comparison by the roofline.

    Attributes:
      model: a checkpoint directory or a config.json.
      baseline: the same for the model to compare with, for example the parent.
      scenario: names such as h100x8-64k, or YAML files.
      assumptions: a YAML file that replaces the package's own assumptions.
      routing: a JSON list of the relative loads of a layer's experts, largest first.
      json: prints JSON instead of tables.
      list: prints the names of usual scenarios, and nothing else.
    """

    model: Path | None = None
    baseline: Path | None = None
    scenario: tuple[str, ...] = ()
    assumptions: Path = DEFAULT
    routing: Path | None = None
    json: bool = False
    list: bool = False

    def __post_init__(self) -> None:
        for name in ("model", "baseline", "scenario"):
            if not (getattr(self, name) or self.list):
                raise ConfigError(f"{name} must be given")


def run(settings: EstimateSettings) -> None:
    """Prints the estimates, or the names of scenarios."""
    if settings.list:
        print("\n".join(scenario_names()))
        return
    assert settings.model is not None and settings.baseline is not None
    roofline = Roofline(assumptions=read_assumptions(settings.assumptions), profile=_read_profile(settings.routing))
    model, baseline = read_architecture(settings.model), read_architecture(settings.baseline)
    found = [compare(model, baseline, get_scenario(text), roofline) for text in settings.scenario]
    if settings.json:
        values = [comparison.as_json() for comparison in found]
        print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
    else:
        for comparison in found:
            show(comparison, plain_console())


def read_architecture(path: Path) -> Architecture:
    """The model that a checkpoint directory or a config.json describes. Raises `CheckpointError` if it is not valid."""
    source = config_path(path)
    data = read_json(source)
    return Architecture(parse_config(data, source), parse_form(data, source))


def show(comparison: Comparison, console: Console) -> None:
    """Prints a comparison as a table."""
    scenario, model, baseline = comparison.scenario, comparison.model, comparison.baseline
    table = Table(
        "",
        "model",
        "baseline",
        "model / baseline",
        title=f"{scenario.name}: {scenario.input_tokens:,} tokens in, {scenario.output_tokens:,} out, "
        f"{scenario.devices} x {scenario.hardware}, {scenario.kv_bytes_per_value} bytes per cached value",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, form: str, of_model: Number, of_baseline: Number, scale: Number = 1) -> None:
        ratio = f"{of_model / of_baseline:.3f}" if of_baseline else ""
        table.add_row(name, format(of_model * scale, form), format(of_baseline * scale, form), ratio)

    add("tokens per second", ",.0f", model.throughput, baseline.throughput)
    add("batch", ",", model.batch, baseline.batch)
    add("memory GB", ",.1f", model.memory_bytes, baseline.memory_bytes, 1e-9)
    for kind, unit, scale in (("prefill", "s", 1), ("decode", "ms per step", 1e3)):
        table.add_section()
        add(f"{kind} {unit}", ",.3f", _seconds(model, kind), _seconds(baseline, kind), scale)
        for part in PARTS:
            pair = model.breakdown[kind][part], baseline.breakdown[kind][part]
            if any(pair):
                add(f"  {part.replace('_', ' ')}", ",.3f", *pair, scale)
    console.print(table)


def _seconds(estimate: Estimate, kind: str) -> float:
    return estimate.prefill_seconds if kind == "prefill" else estimate.decode_seconds


def _read_profile(path: Path | None) -> tuple[float, ...] | None:
    if path is None:
        return None
    loads: Json = parse_json(read_text(path), str(path))
    if not isinstance(loads, list) or not loads:
        raise PuzzleError(f"{path} holds {shown(loads)}, but must hold a list of loads")
    for place, load in enumerate(loads):
        if not is_number(load) or not 0 <= load <= 1e300:
            raise PuzzleError(f"{path}: load {place} is {shown(load)}, but must be a finite number of at least 0")
    return tuple(map(float, loads))
