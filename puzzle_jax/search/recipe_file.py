"""Recipes of searches, from files, names and the command line, and what a search of the user's own model starts from.

The recipe `tiny` is the default for the embedded parent alone: its tasks, its answers of at most 128 tokens and its
scenario fit no other model. For any other parent the user says what it is asked (`traces.tasks` with
`traces.max_tokens`) or gives what it answered (`traces.file`), and what the deployment is, or names a recipe for a
model of its size. Where answers are given and no scenario is, the scenario is taken from their lengths, since they show
what the parent is used for. Whatever is filled in is told in a warning.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.errors import ConfigError, PuzzleError, PuzzleWarning
from puzzle_jax.files import parse_yaml
from puzzle_jax.generate.traces import Trace, read_traces
from puzzle_jax.search.recipe import EMBEDDED_PARENT, Recipe
from puzzle_jax.settings.files import check_file, parse_settings, recipe_names, recipe_path
from puzzle_jax.tasks import Chat

EMBEDDED_RECIPE = "tiny"

_LENGTHS = ("scenario.input_tokens", "scenario.output_tokens")

_BATCH, _EXPERT_BYTES_RATIO = 8, 0.75
"""Requests of a scenario that is taken from traces, and the target of a search that was given none."""


def parse_recipe(
    arguments: Sequence[str], prog: str, stages: Sequence[str] = (), *, deployment: bool = True
) -> tuple[str, Recipe]:
    """The stage ("all" by default) and the recipe that a command line asks for.

    Args:
      deployment: False where scenario and target will not be looked at, nor what the parent is asked.

    Raises `ConfigError` for whatever is wrong with either, and where a parent of the user's own comes with too little
    to search by. `--help` and `--print_config` print and exit.
    """
    names = recipe_names("search")
    given = _given_fields(arguments, names)
    parent = given.get("parent", EMBEDDED_PARENT)
    embedded = _is_embedded(parent)
    shows = any(argument.startswith(("-h", "--help", "--print_config")) for argument in arguments)
    if not embedded and given["recipe"] == EMBEDDED_RECIPE:
        _tell(
            f"recipe {EMBEDDED_RECIPE} is made for the embedded parent, and its tasks, limits and scenario need not "
            f"fit {parent}"
        )
    elif not embedded and not deployment:
        unused = {"scenario.name": "unused", **dict.fromkeys(_LENGTHS, 1), "target.max_expert_bytes_ratio": 1}
        arguments = [*(f"--{name}={value}" for name, value in unused.items() if name not in given), *arguments]
    elif not embedded and not shows:
        arguments = [*(f"--{name}={value}" for name, value in _own_defaults(given).items()), *arguments]
    stage, recipe = parse_settings(
        arguments,
        Recipe,
        prog=prog,
        description="From a trained parent to the child that serves a deployment best.",
        names=names,
        default=EMBEDDED_RECIPE if embedded else None,
        choice=("stage", ("all", *stages), "one stage, or all"),
    )
    assert stage is not None
    return stage, recipe


def _own_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a search of the user's own model takes for fields that were not given, by dotted name.

    Raises `ConfigError`, naming the fields and the recipes there are, where something is missing that only the user
    can know.
    """
    parent, file = Path(str(given["parent"])), given.get("traces.file")
    lengths = [] if "scenario" in given else [name for name in _LENGTHS if name not in given]
    missing = (
        []
        if file or given.get("traces.tasks") or "traces" in given
        else ["traces.file (answers of the parent) or traces.tasks with traces.max_tokens (problems to ask it)"]
    )
    if len(lengths) == 1 or not file:
        missing += lengths
    if missing:
        others = ", ".join(name for name in recipe_names("search") if name != EMBEDDED_RECIPE)
        raise ConfigError(
            f"a search of {parent} needs {' and '.join(missing)}, since no default fits every model; "
            f"give them, or --recipe with one of {others}"
        )
    defaults: dict[str, Any] = {} if "run" in given else {"run": Path("runs") / parent.resolve().name}
    if not {"scenario", "scenario.name"} & set(given):
        defaults["scenario.name"] = "serving"
    if lengths:
        found = _mean_lengths(read_traces(Path(str(file)), Chat.load(parent if parent.is_dir() else parent.parent)))
        defaults |= dict(zip(lengths, found, strict=True))
        if "scenario.batch" not in given:
            defaults["scenario.batch"] = _BATCH
        _tell(
            f"no scenario was given, so it is taken from {file}: prompts of {found[0]} and answers of {found[1]} tokens"
            f", the means there, {given.get('scenario.batch', _BATCH)} requests together (scenario.* says otherwise)"
        )
    if not any(name.partition(".")[0] == "target" for name in given):
        defaults["target.max_expert_bytes_ratio"] = _EXPERT_BYTES_RATIO
        _tell(
            f"no target was given, so it is at most {_EXPERT_BYTES_RATIO:.0%} of the parent's expert bytes "
            "(target.max_expert_bytes_ratio, target.min_speedup and others say otherwise)"
        )
    return defaults


def _mean_lengths(traces: Sequence[Trace]) -> tuple[int, int]:
    """Mean tokens of prompts and of answers, rounded up."""
    sums = (sum(len(trace.prompt) for trace in traces), sum(len(trace.completion) for trace in traces))
    return -(-sums[0] // len(traces)), -(-sums[1] // len(traces))


def _given_fields(arguments: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Fields that recipe files and the command line set, by dotted name; and the last "recipe" that was named, or None.

    Raises `ConfigError` for a recipe that is missing or cannot be read.
    """
    given: dict[str, Any] = {"recipe": None}
    for name, value in _options(arguments):
        if name == "recipe":
            given["recipe"] = value
            given |= dict(_flat(check_file(recipe_path(value, names))))
        else:
            given |= dict(_flat(_parsed(value), name))
    return {name: value for name, value in given.items() if value is not None or name.startswith(("recipe", "target"))}


def _parsed(value: str) -> Any:
    """A mapping or null that an option's value writes in YAML; any other value as it is."""
    if not value.lstrip().startswith("{") and value != "null":
        return value
    try:
        return parse_yaml(value, "the option")
    except PuzzleError:
        return value


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names and values of all options."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            yield name.removeprefix("--"), value if equals else following


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings, by dotted name."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value


def _is_embedded(parent: Any) -> bool:
    try:
        return os.path.samefile(str(parent), EMBEDDED_PARENT)
    except (OSError, ValueError):
        return False


def _tell(message: str) -> None:
    warnings.warn(message, PuzzleWarning, stacklevel=3)
