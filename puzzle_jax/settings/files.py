"""Settings from files, names and the command line, and what is wrong with them before their values are looked at.

The parser of the command line takes some of a file's form for granted, and answers with a traceback, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from puzzle_jax.commands import checked_path, did_you_mean
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.files import parse_yaml, read_text
from puzzle_jax.settings.fields import checked_arguments, checked_fields, setting_hints
from puzzle_jax.settings.messages import plain_message

RECIPES = Path(__file__).parent.parent / "recipes"
"""Files that come with the package."""

Settings = TypeVar("Settings")

OTHER_OPTIONS = ("--recipe", "--print_config", "--help")
"""Options of every command that takes a recipe, besides the recipe's fields."""


def recipe_names(verb: str) -> list[str]:
    """Recipes of a verb that come with the package: `VERB-*.yaml`, or what no verb's name begins for "search"."""
    stems = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if verb == "search":
        return [stem for stem in stems if stem.partition("-")[0] not in ("pretrain", "distill", "grpo")]
    return [stem for stem in stems if stem.startswith(f"{verb}-")]


def parse_settings(
    arguments: Sequence[str],
    kind: type[Settings],
    *,
    prog: str,
    description: str,
    names: Sequence[str],
    default: str | None = None,
    choice: tuple[str, Sequence[str], str] | None = None,
) -> tuple[str | None, Settings]:
    """The settings that a command line asks for, and the positional choice where there is one.

    Args:
      kind: a dataclass whose fields are the options.
      names: of recipes that `--recipe` takes besides files.
      default: the one of them that is read without `--recipe`.
      choice: name, values and help of an optional positional argument, whose first value is the default.

    Raises `ConfigError` for whatever is wrong with either. `--help` and `--print_config` print and exit.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    defaults: list[Any] = [] if default is None else [str(RECIPES / f"{default}.yaml")]
    parser = ArgumentParser(
        prog=prog, description=description, default_config_files=defaults, exit_on_error=False, allow_abbrev=False
    )
    if choice is not None:
        positional, values, text = choice
        parser.add_argument(positional, nargs="?", choices=tuple(values), default=values[0], help=text)
    or_name = f", or one of {', '.join(names)}" if names else ""
    of_default = f" (default: {default})" if default else ""
    parser.add_argument("--recipe", action="config", help=f"settings: a YAML file{or_name}{of_default}")
    parser.add_class_arguments(kind)
    given = checked_arguments(_recipes_first(arguments, names, kind), kind, OTHER_OPTIONS)
    try:
        settings = parser.parse_args(given)
    except ArgumentError as error:
        raise ConfigError(plain_message(error, setting_hints(kind), None if choice is None else choice[:2])) from error
    chosen = None if choice is None else settings.pop(choice[0])
    settings.pop("recipe", None)
    settings.pop("__default_config__", None)
    check_sections(settings.as_dict(), kind)
    return chosen, kind(**parser.instantiate(settings))


def _recipes_first(arguments: Sequence[str], names: Sequence[str], kind: type) -> list[str]:
    """Recipe files, checked, before all other arguments: the command line overrides them wherever they stand."""
    recipes: list[str] = []
    others: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--recipe":
            others.append(argument)
            continue
        text = value if equals else next(rest, None)
        if text is None:
            raise ConfigError("--recipe needs a value: a YAML file or a recipe's name")
        path = recipe_path(text, names)
        fields = check_file(path)
        whole = checked_fields(fields, kind, f"recipe {path}")
        # A file that needs no mending goes as it is, so that messages can name it.
        recipes.append(f"--recipe={path if whole == fields else json.dumps(whole, default=str)}")
    return [*recipes, *others]


def recipe_path(text: str, names: Sequence[str]) -> Path:
    """The file of a recipe that is named or given by its path; raises `ConfigError` where there is none to read."""
    path = RECIPES / f"{text}.yaml" if text in names else checked_path(text, "recipe")
    try:
        there = path.exists()
    except OSError:  # a name that is too long, say
        there = False
    if not there:
        hint = did_you_mean(text, names)
        raise ConfigError(
            f"recipe is {shown(text)}, but there is no such file, and the names are {', '.join(names)}{hint}"
        )
    check_file(path)
    return path


def check_file(path: Path) -> dict[str, Any]:
    """The fields in a recipe file; raises `ConfigError`, naming it, where it holds no mapping, or a field twice."""
    data = parse_yaml(read_text(path, ConfigError), f"recipe {path}", ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"recipe {path} holds {shown(data)}, but must hold the fields of a recipe")
    for name in data:
        if not isinstance(name, str):
            raise ConfigError(f"recipe {path} has a field {shown(name)}, but fields have names")
    return data


def check_sections(settings: Mapping[str, Any], kind: type, prefix: str = "") -> None:
    """Checks parsed settings, by name, of a dataclass that holds others.

    Raises `ConfigError` that names a section which is no mapping, or a field that is null but may not be.
    """
    for name, hint in get_type_hints(kind).items():
        value = settings.get(name)
        if is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is {value!r}, but must be a mapping of its fields")
            check_sections(value, hint, f"{prefix}{name}.")
        elif value is None and NoneType not in get_args(hint):
            raise ConfigError(f"{prefix}{name} is None, but must have a value")
