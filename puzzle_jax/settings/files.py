"""Recipes: files of settings, by name or path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.commands import checked_path, did_you_mean
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.files import parse_yaml, read_text

RECIPES = Path(__file__).parent.parent / "recipes"
"""Directory of the recipes that come with the package."""

ASSETS = RECIPES.parent / "assets"
"""Directory of the embedded checkpoints that come with the package."""

_EMBEDDED = "embedded:"


def with_embedded(value: Any, where: str) -> Any:
    """Replaces `embedded:NAME`, in a path or in the paths of a mapping or a list, by the path of that checkpoint.

    Raises `ConfigError` if the package has no such checkpoint.
    """
    if isinstance(value, Mapping):
        return {key: with_embedded(of, where) for key, of in value.items()}
    if isinstance(value, list):
        return [with_embedded(of, where) for of in value]
    if not isinstance(value, str) or not value.startswith(_EMBEDDED):
        return value
    name, names = value.removeprefix(_EMBEDDED), sorted(path.name for path in ASSETS.iterdir() if path.is_dir())
    if name not in names:
        raise ConfigError(
            f"{where} is {shown(value)}, but the embedded checkpoints are {', '.join(names)}{did_you_mean(name, names)}"
        )
    return str(ASSETS / name)


def recipe_names(verb: str | None) -> list[str]:
    """Recipes of a verb that come with the package: `VERB-*.yaml`; for "search", those with no other verb's name."""
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if verb == "search":
        return [stem for stem in stems if stem.partition("-")[0] not in ("pretrain", "distill", "grpo", "run")]
    return [stem for stem in stems if verb is not None and stem.startswith(f"{verb}-")]


def recipe_path(text: str, names: Sequence[str]) -> Path:
    """The file of a recipe that is given by name or path; raises `ConfigError` if there is none."""
    path = RECIPES / f"{text}.yaml" if text in names else checked_path(text, "recipe")
    try:
        there = path.exists()
    except OSError:  # a name that is too long, say
        there = False
    if not there:
        those = f", and the names are {', '.join(names)}" if names else ""
        raise ConfigError(f"recipe is {shown(text)}, but there is no such file{those}{did_you_mean(text, names)}")
    return path


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields in a recipe file; raises `ConfigError`, naming it, if it holds no mapping, or a field twice."""
    data = parse_yaml(read_text(path, ConfigError), f"recipe {path}", ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} holds {shown(data)}, but must hold the fields of a recipe")
    for name in data:
        if not isinstance(name, str):
            raise ConfigError(f"recipe {path} has a field {shown(name)}, but fields have names")
    return data
