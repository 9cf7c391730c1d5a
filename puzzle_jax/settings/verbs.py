"""A verb of the command line, and the single entry point of every verb.

A verb has a frozen dataclass of settings and a function that takes them. Everything else is the same for all: options
are the dataclass's fields by dotted name, with "-" and "_" equivalent; `--recipe` reads them from a YAML file, which
the command line overrides in any order; `forms` says how lists, mappings and sections are written; `--help` shows the
important settings, `--help-all` all of them, `--print_config` a file to edit and pass to `--recipe`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

import yaml

from puzzle_jax.codec import to_plain
from puzzle_jax.commands import did_you_mean, enable_compilation_cache, guarded, say
from puzzle_jax.environment import chosen_kernels
from puzzle_jax.errors import ConfigError, shown
from puzzle_jax.settings.arguments import read_arguments
from puzzle_jax.settings.fields import Setting, settings_of
from puzzle_jax.settings.files import read_recipe, recipe_names, recipe_path
from puzzle_jax.settings.forms import formed
from puzzle_jax.settings.help import help_text
from puzzle_jax.settings.messages import plain_message


@dataclass(frozen=True)
class Verb:
    """One verb. Objects are named as "package.module:name", so that nothing is imported before it is needed.

    Attributes:
      name: name on the command line, such as "train distill".
      summary: what it does, in one line.
      settings: the frozen dataclass of its settings.
      run: called with the settings; returns the exit code, None for 0.
      shown: dotted names of the settings that `--help` shows.
      example: a command line that `--help` shows, without "puzzle" and the verb.
      recipes: verb whose recipe names `--recipe` accepts; None: it accepts files only.
      positional: fields that are given by position rather than by name.
      base: called with the given fields by dotted name, the last recipe's name, and whether the verb will run; returns
        fields that the given ones override.
      computes: whether compiled programs are kept between runs.
      interrupted: what a user who interrupted it should know.
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
        """The name that precedes every message."""
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
                chosen_kernels()
                enable_compilation_cache()
            code = loaded(verb.run)(settings) or 0

    return guarded(verb.program, run, verb.interrupted) or code


def run_table(program: str, verbs: Mapping[str, Verb], arguments: Sequence[str] | None = None) -> int:
    """Runs the verb that the first argument names, or the one named ""; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, *rest = arguments or ["-h"]
    if name in verbs and name:
        return run_verb(verbs[name], rest)
    if "" in verbs:
        return run_verb(verbs[""], arguments)
    if name in ("-h", "--help"):
        print(f"usage: puzzle {program} VERB [OPTIONS]\n")
        print("\n".join(f"  {name:<15} {verb.summary}" for name, verb in verbs.items()))
        return 0 if arguments else 2
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
    given = _given(verb, arguments, settings)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        values = parser.parse_object(given)
    except ArgumentError as error:
        raise ConfigError(plain_message(error, settings, given)) from error
    try:
        return kind(**parser.instantiate(values))
    except ConfigError as error:
        raise _in_section(error, kind, values) from None


def _in_section(error: ConfigError, kind: type, values: Any) -> ConfigError:
    """The error, with the name of the section that its message is about if that section is another verb's recipe."""
    from jsonargparse import ArgumentParser

    hints = get_type_hints(kind)
    for name in (field.name for field in fields(kind) if field.metadata.get("recipe")):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(hints[name])
        try:
            hints[name](**parser.instantiate(values[name]))
        except ConfigError as found:
            if str(found) == str(error):
                return ConfigError(f"{name}: {error}")
    return error


def loaded(name: str) -> Any:
    """The object that "package.module:name" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _given(verb: Verb, arguments: Sequence[str], settings: Mapping[str, Setting], runs: bool = True) -> dict[str, Any]:
    """Values from recipes and the command line, by dotted name, on top of those that the verb starts from."""
    options, words = read_arguments(arguments, settings, verb.positional)
    given: dict[str, Any] = {}
    recipe, replaced = None, set()
    for recipe in (text for name, text in options if name == "--recipe"):
        path = recipe_path(recipe, recipe_names(verb.recipes))
        for name, value in read_recipe(path).items():
            given |= formed(value, name, settings, f"recipe {path}: ")
    for name, value in (option for option in options if option[0] in settings):
        for field, form in formed(value, name, settings, "--").items():
            # A mapping replaces a recipe's; later mappings on the command line, and single keys, add to it.
            adds = isinstance(form, dict) and (field in replaced or isinstance(value, dict))
            before = given.get(field)
            given[field] = {**before, **form} if adds and isinstance(before, dict) else form
            replaced.add(field)
    for name, word in zip(verb.positional, words, strict=False):
        given |= formed(word, name, settings, "")
    start: dict[str, Any] = {}
    for name, value in ({} if verb.base is None else loaded(verb.base)(given, recipe, runs)).items():
        start |= formed(value, name, settings, "")
    return start | given


def _config(verb: Verb, arguments: Sequence[str]) -> str:
    """All settings as a recipe file, without required ones that were not given."""
    settings = settings_of(loaded(verb.settings))
    defaults = {name: of.default for name, of in settings.items() if of.section is None and of.default is not MISSING}
    whole: dict[str, Any] = {}
    for name, value in (defaults | _given(verb, arguments, settings, runs=False)).items():
        *sections, field = name.split(".")
        place = whole
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = to_plain(value)
    return yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)


def _end(arguments: Sequence[str]) -> int:
    """The number of arguments before "--", which may be options."""
    return list(arguments).index("--") if "--" in arguments else len(arguments)
