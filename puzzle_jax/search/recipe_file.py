"""Settings of a search that recipes and the command line leave open.

The recipe `tiny` is the default for the embedded parent alone: its tasks, its answers of at most 128 tokens and its
scenario fit no other model. For any other parent the user says what to ask it (`traces.tasks` with
`traces.max_tokens`) or provides its answers (`traces.file`), and describes the deployment, or names a recipe for a
model of its size. If answers but no scenario are given, the scenario is taken from their lengths, since they show what
the parent is used for. A warning names the scenario and the target that are filled in.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from puzzle_jax.errors import ConfigError, PuzzleWarning
from puzzle_jax.generate.traces import Trace, read_traces
from puzzle_jax.search.recipe import EMBEDDED_PARENT
from puzzle_jax.settings.files import RECIPES, read_recipe, recipe_names
from puzzle_jax.tasks import Chat

EMBEDDED_RECIPE = "tiny"

_LENGTHS = ("scenario.input_tokens", "scenario.output_tokens")

_BATCH, _EXPERT_BYTES_RATIO = 8, 0.75
"""The batch of a scenario that is taken from traces, and the target of a search that was given none."""


def starting_fields(given: Mapping[str, object], recipe: str | None, runs: bool) -> dict[str, object]:
    """Values of fields that are not given, by dotted name.

    Args:
      given: values from recipes and the command line, by dotted name.
      recipe: the last recipe that was named.
      runs: False if settings are only shown.

    Raises `ConfigError` if settings that a search of the user's own parent needs are missing.
    """
    parent = given.get("parent", EMBEDDED_PARENT)
    if is_embedded_parent(parent):
        return read_recipe(RECIPES / f"{EMBEDDED_RECIPE}.yaml")
    if recipe == EMBEDDED_RECIPE:
        _warn(
            f"recipe {EMBEDDED_RECIPE} is made for the embedded parent, and its tasks, limits and scenario need not "
            f"fit {parent}"
        )
        return {}
    return _own_defaults(given) if runs else {}


def without_deployment(given: Mapping[str, object], recipe: str | None, runs: bool) -> dict[str, object]:
    """The same as `starting_fields`, for verbs that do not use scenario, target and tasks."""
    parent = given.get("parent", EMBEDDED_PARENT)
    if is_embedded_parent(parent) or recipe == EMBEDDED_RECIPE:
        return starting_fields(given, recipe, runs)
    return {"scenario.name": "unused", **dict.fromkeys(_LENGTHS, 1), "target.max_expert_bytes_ratio": 1.0}


def _own_defaults(given: Mapping[str, object]) -> dict[str, object]:
    """Values of fields that were not given in a search of the user's own model, by dotted name.

    Raises `ConfigError`, naming the fields and the available recipes, if something is missing that only the user can
    know.
    """
    parent, file = Path(str(given["parent"])), given.get("traces.file")
    lengths = [name for name in _LENGTHS if name not in given]
    missing = (
        []
        if file or given.get("traces.tasks")
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
    defaults: dict[str, object] = {} if "run" in given else {"run": f"runs/{parent.resolve().name}"}
    if "scenario.name" not in given:
        defaults["scenario.name"] = "serving"
    if lengths:
        found = _mean_lengths(read_traces(Path(str(file)), Chat.load(parent if parent.is_dir() else parent.parent)))
        defaults |= dict(zip(lengths, found, strict=True))
        if "scenario.batch" not in given:
            defaults["scenario.batch"] = _BATCH
        _warn(
            f"no scenario was given, so it is taken from {file}: prompts of {found[0]} and answers of {found[1]} tokens"
            f", the means there, {given.get('scenario.batch', _BATCH)} requests together (scenario.* says otherwise)"
        )
    if not any(name.partition(".")[0] == "target" for name in given):
        defaults["target.max_expert_bytes_ratio"] = _EXPERT_BYTES_RATIO
        _warn(
            f"no target was given, so it is at most {_EXPERT_BYTES_RATIO:.0%} of the parent's expert bytes "
            "(target.max_expert_bytes_ratio, target.min_speedup and others say otherwise)"
        )
    return defaults


def _mean_lengths(traces: Sequence[Trace]) -> tuple[int, int]:
    """Mean numbers of tokens in prompts and in answers, rounded up."""
    sums = (sum(len(trace.prompt) for trace in traces), sum(len(trace.completion) for trace in traces))
    return -(-sums[0] // len(traces)), -(-sums[1] // len(traces))


def is_embedded_parent(parent: object) -> bool:
    """Returns whether a path leads to the embedded parent."""
    try:
        return os.path.samefile(str(parent), EMBEDDED_PARENT)
    except (OSError, ValueError):
        return False


def _warn(message: str) -> None:
    warnings.warn(message, PuzzleWarning, stacklevel=3)
