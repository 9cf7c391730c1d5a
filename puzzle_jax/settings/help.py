"""The pages of `--help` and `--help-all`: settings with their forms and defaults, and an example."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path

from puzzle_jax.settings.fields import Setting, hint_options

_WIDTH, _COLUMN = 110, 34
_FORMS = {bool: "", float: "X", int: "N", Path: "PATH", str: "TEXT"}


def help_text(
    program: str,
    summary: str,
    settings: Mapping[str, Setting],
    shown: Sequence[str],
    positional: Sequence[str],
    example: str,
    recipes: Sequence[str],
) -> str:
    """The help page of a verb: its usage, the settings that are `shown` or positional, an example (given without the
    program), and the names that `--recipe` accepts."""
    places = "".join(f" {name.upper()}" for name in positional)
    lines = [f"usage: {program}{places} [--recipe {'NAME|' if recipes else ''}FILE] [OPTIONS]", "", summary, ""]
    for name in dict.fromkeys([*positional, *shown]):
        if settings[name].section is None:
            lines += _entry(settings[name], name in positional)
    lines += ["", f"Example:\n  {program} {example}", ""]
    if recipes:
        lines += textwrap.wrap(f"Recipes: {', '.join(recipes)}.", _WIDTH)
    count = sum(setting.section is None for setting in settings.values())
    lines += textwrap.wrap(
        f"--help-all shows all {count} settings, --print_config prints them as a file for --recipe. Lists are written "
        "a,b; mappings and sections (the name before a dot) k=v,k=v; or all of them in YAML.",
        _WIDTH,
    )
    return "\n".join(lines)


def _entry(setting: Setting, by_place: bool) -> list[str]:
    name = setting.name.upper() if by_place else f"--{setting.name} {_form(setting)}"
    if setting.default is True:
        name = f"--[no_]{setting.name}"
    default = "required" if setting.default is MISSING else f"default: {written(setting.default)}"
    said = setting.help.removesuffix(".")
    said = f"{said} ({default})" if default not in ("default: ", "default: false") else said
    lines = textwrap.wrap(said, _WIDTH - _COLUMN) or [""]
    first = f"  {name.strip():<{_COLUMN - 2}}"
    head = [first + lines.pop(0)] if len(first) == _COLUMN and not first[-1].strip() else [first]
    return [*head, *(" " * _COLUMN + line for line in lines)]


def _form(setting: Setting) -> str:
    if setting.mapping is not None:
        return "K=V,..."
    if setting.element is not None:
        return "PATH ..." if setting.element is Path else "A,B,..."
    kinds = list(hint_options(setting.hint))
    return "|".join(setting.choices) or next((form for of, form in _FORMS.items() if of in kinds), "VALUE")


def written(value: object) -> str:
    """A default as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return ",".join(f"{key}={written(of).replace(',', ':')}" for key, of in value.items())
    return ",".join(map(written, value)) if isinstance(value, tuple | list) else str(value)
