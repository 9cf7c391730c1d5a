"""A verb of the command line, and the one way into every verb.

A verb has a frozen dataclass of settings and a function that takes them. Everything else is the same for all: options
are the dataclass' fields by dotted name, "-" and "_" alike; `--recipe` reads them from a YAML file, which the command
line overrides wherever it stands; `forms` says how lists, mappings and sections are written; `--help` shows what
matters, `--help-all` everything, `--print_config` a file to edit and give back with `--recipe`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from puzzle_jax.commands import did_you_mean, enable_compilation_cache, guarded, say
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.settings.arguments import read_arguments
from puzzle_jax.settings.fields import Setting, settings_of
from puzzle_jax.settings.files import read_recipe, recipe_names, recipe_path
from puzzle_jax.settings.forms import formed, unknown_field
from puzzle_jax.settings.help import help_text
from puzzle_jax.settings.messages import plain_message


@dataclass(frozen=True)
class Verb:
    """One verb. Modules are named as "package.module:name", so that nothing is imported before it is asked for.

    Attributes:
      name: as it is called, such as "train distill".
      summary: what it does, in one line.
      settings: the frozen dataclass of its settings.
      run: called with them; what it returns is the exit code, None being 0.
      shown: dotted names of the settings that `--help` shows.
      example: a command line that `--help` shows, without "puzzle" and the verb.
      recipes: of which verb `--recipe` takes names; None: it takes files alone.
      positional: fields that are given by place rather than by name.
      base: called with the fields that were given, the last recipe's name, and whether the verb will run; returns
        fields that the given ones are laid over.
      computes: whether compiled programs are kept between runs.
      interrupted: what a user who stopped it should know.
    """

    name: str
    summary: str
    settings: str
    run: str
    shown: tuple[str, ...]
    example: str
    recipes: str | None = None
    positional: tuple[str, ...] = ()
    base: str | None = None
    computes: bool = True
    interrupted: str = "nothing was written"

    @property
    def program(self) -> str:
        """What stands before every message."""
        return f"puzzle {self.name}"


def run_verb(verb: Verb, arguments: Sequence[str]) -> int:
    """Parses a command line and runs the verb; returns the exit code."""
    code = 0

    def run() -> None:
        nonlocal code
        ahead = [argument.replace("_", "-") for argument in arguments[: _end(arguments)]]
        if {"-h", "--help", "--help-all"} & set(ahead):
            settings = settings_of(loaded(verb.settings))
            shown = list(settings) if "--help-all" in ahead else verb.shown
            names = recipe_names(verb.recipes)
            print(help_text(verb.program, verb.summary, settings, shown, verb.positional, verb.example, names))
        elif "--print-config" in ahead:
            print(_config(verb, arguments), end="")
        else:
            settings = parse(verb, arguments)
            if verb.computes:
                enable_compilation_cache()
            code = loaded(verb.run)(settings) or 0

    return guarded(verb.program, run, verb.interrupted) or code


def run_table(program: str, verbs: Mapping[str, Verb], arguments: Sequence[str]) -> int:
    """Runs the verb of a table that the first argument names, or the one named ""; returns the exit code."""
    name, *rest = arguments or [""]
    if name in verbs and name:
        return run_verb(verbs[name], rest)
    if "" in verbs:
        return run_verb(verbs[""], arguments)
    if name in ("-h", "--help", ""):
        print(f"usage: puzzle {program} VERB [OPTIONS]\n")
        print("\n".join(f"  {name:<15} {verb.summary}" for name, verb in verbs.items()))
        return 0 if name else 2
    problem = f"there is no option {name}" if name.startswith("-") else f"verb is {shown(name)}"
    say(f"puzzle {program}: {problem}, but must be one of {', '.join(verbs)}{did_you_mean(name, verbs)}")
    return 2


def parse(verb: Verb, arguments: Sequence[str]) -> Any:
    """The settings that a command line asks for: an instance of the verb's dataclass.

    Raises `ConfigError` for whatever is wrong with them.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    kind = loaded(verb.settings)
    settings = settings_of(kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_object(_fields(verb, arguments, settings))
    except ArgumentError as error:
        raise ConfigError(plain_message(error, {name: of.hint for name, of in settings.items()})) from error
    return kind(**parser.instantiate(values))


def loaded(name: str) -> Any:
    """What "package.module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _fields(verb: Verb, arguments: Sequence[str], settings: Mapping[str, Setting], runs: bool = True) -> dict[str, Any]:
    """What recipes and the command line give, by sections, over what the verb starts from."""
    options, words = read_arguments(arguments, settings, verb.positional)
    given: dict[str, Any] = {}
    recipe, replaced = None, set()
    for recipe in (text for name, text in options if name == "--recipe"):
        path = recipe_path(recipe, recipe_names(verb.recipes))
        for name, value in read_recipe(path).items():
            if name not in settings:
                raise unknown_field(name, settings, f"recipe {path}: ")
            _lay(given, name, formed(value, name, settings, f"recipe {path}: "), settings)
    for name, value in (option for option in options if option[0] in settings):
        form = formed(value, name, settings, "--")
        if settings[name].mapping is not None and isinstance(form, dict):
            # A mapping replaces a recipe's; what follows on the command line, or gives one key, adds to it.
            form = {**(_get(given, name) if name in replaced or isinstance(value, dict) else {}), **form}
            replaced.add(name)
        _lay(given, name, form, settings)
    for name, word in zip(verb.positional, words, strict=False):
        _lay(given, name, formed(word, name, settings, ""), settings)
    if verb.base is None:
        return given
    start: dict[str, Any] = {}
    for fields in (loaded(verb.base)(given, recipe, runs), given):
        for name, value in fields.items():
            _lay(start, name, value, settings)
    return start


def _config(verb: Verb, arguments: Sequence[str]) -> str:
    """All settings as a recipe file; those that must be given and are not are left out."""
    settings = settings_of(loaded(verb.settings))
    whole: dict[str, Any] = {}
    for name, setting in settings.items():
        if setting.section is None and setting.default is not MISSING:
            _lay(whole, name, setting.default, settings)
    for name, value in _fields(verb, arguments, settings, runs=False).items():
        _lay(whole, name, value, settings)
    return yaml.safe_dump(_plain(whole), sort_keys=False, allow_unicode=True)


def _lay(over: dict[str, Any], name: str, value: Any, settings: Mapping[str, Setting]) -> None:
    """Puts the value of a setting among others; a section's fields are put there one by one."""
    if settings[name].section is not None and isinstance(value, Mapping):
        _section(over, f"{name}.")
        for field, of in value.items():
            _lay(over, f"{name}.{field}", of, settings)
    else:
        _section(over, name)[name.rpartition(".")[2]] = value


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The dictionary in which the setting's value is, made where it is not there."""
    for section in name.split(".")[:-1]:
        values = values.setdefault(section, {})
    return values


def _get(values: dict[str, Any], name: str) -> Mapping[str, Any]:
    return _section(values, name).get(name.rpartition(".")[2]) or {}


def _plain(value: Any) -> Any:
    """The value as YAML has it."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {key: _plain(of) for key, of in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(of) for of in value]
    return str(value) if isinstance(value, Path) else value


def _end(arguments: Sequence[str]) -> int:
    """How many arguments may be options."""
    return list(arguments).index("--") if "--" in arguments else len(arguments)
