"""The resolved settings of a run, in files that the run or a stage's own verb takes as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from puzzle_jax.codec import to_plain
from puzzle_jax.files import write_beside
from puzzle_jax.run.places import SETTINGS_FILE, STAGE_SETTINGS
from puzzle_jax.run.settings import RunSettings

_TOP = ("stage", "dry_run", "price_per_gpu_hour")
"""Settings of one call, which are not part of the run."""

_RUN_BY = {
    "search": "puzzle search",
    "traces": "puzzle train traces",
    "distill": "puzzle train distill",
    "accuracy": "puzzle train grpo",
    "length": "puzzle train grpo",
    "control": "puzzle train grpo",
    "average": "puzzle train average",
    "evaluate": "puzzle evaluate",
}


def write_settings(settings: RunSettings) -> None:
    """Writes RUN/settings.yaml with everything, and RUN/settings/STAGE.yaml for each stage with a verb of its own."""
    values = resolved(settings)
    _write_yaml(settings.run / SETTINGS_FILE, values)
    values["control"] = to_plain(settings.control_recipe)
    (settings.run / STAGE_SETTINGS).mkdir(exist_ok=True)
    for name in settings.stages:
        if name in _RUN_BY:
            head = f"{_RUN_BY[name]} --recipe {settings.run / STAGE_SETTINGS / name}.yaml"
            _write_yaml(settings.run / STAGE_SETTINGS / f"{name}.yaml", values[name], head)


def resolved(settings: RunSettings) -> dict[str, Any]:
    """All settings of a run in the form of a recipe."""
    return {name: value for name, value in to_plain(settings).items() if name not in _TOP}


def _write_yaml(path: Path, values: Mapping[str, Any], head: str = "") -> None:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    write_beside(path, (f"# {head}\n{text}" if head else text).encode())
