"""What messages and docs advise can be done as written: options, verbs, recipes, packages and their extras exist."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import tomllib

import pytest

from puzzle_jax.cli import VERBS, main
from puzzle_jax.search.__main__ import SOLVE
from puzzle_jax.settings.arguments import OTHER_OPTIONS
from puzzle_jax.settings.fields import settings_of
from puzzle_jax.settings.files import RECIPES
from puzzle_jax.settings.verbs import loaded
from tests.paths import ROOT

SOURCES = sorted((ROOT / "puzzle_jax").rglob("*.py"))
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLES = [importlib.import_module(f"puzzle_jax.{name}.__main__").VERBS for name in VERBS]
FIELDS = {
    f"--{name}"
    for verb in (SOLVE, *(verb for table in TABLES for verb in table.values()))
    for name in settings_of(loaded(verb.settings))
}
ELSEWHERE = {
    "--exclude",
    "--local-dir",
    "--kv-cache-dtype",
    "--tune",
    "--version",
    "--no",
}  # of hf, vllm, ..., `--no-NAME`
READ = {"--recipe", "--help", "--help-all", "--print_config"}  # handled before other options


def strings(path):
    """Yields the strings of a module, including docstrings; values within f-strings become "{}"."""
    joined = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            joined |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in joined:
            yield node.value


def spelled(option):
    """The name of an option's field: "-" and "_" are the same, and a flag may be turned off."""
    name = "--" + option.removeprefix("--").replace("-", "_")
    return name if name in FIELDS else name.replace("--no_", "--")


OPTIONS = {spelled(option) for option in (*FIELDS, *OTHER_OPTIONS, *ELSEWHERE)}


def test_options_in_messages_exist():
    assert len(OPTIONS) > 150
    for path in SOURCES:
        for text in strings(path):
            for option in re.findall(r"(?<![\w-])--[a-z][a-z_.-]*[a-z]", text):
                assert spelled(option) in OPTIONS, f"{path}: {option} in {text!r}"


def test_settings_in_messages_exist():
    sections = {name.partition(".")[0] for name in FIELDS if "." in name}
    pattern = re.compile(rf"\((?:{'|'.join(section[2:] for section in sections)})\.[a-z_]+\)")
    for path in SOURCES:
        for text in strings(path):
            for found in pattern.findall(text):
                assert f"--{found[1:-1]}" in FIELDS, f"{path}: {found} in {text!r}"


def test_packages_in_messages_and_docs_are_on_an_index_or_in_the_checkout():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(package for packages in extras.values() for package in packages)]
    names = {re.split(r"[\[<>=!~; ]", package)[0].lower() for package in wanted}
    texts = [text for path in SOURCES for text in strings(path)] + [path.read_text() for path in DOCS]
    advice = [found for text in texts for found in re.findall(r"pip install ((?:-\S+ )*'?[\w.\[\],-]+'?)", text)]
    assert len(advice) > 5
    for one in advice:
        *flags, package = shlex.split(one)
        name, _, more = package.rstrip("].").partition("[")
        if "-e" in flags:
            assert name in (".", "") and {*more.split(",")} <= {*extras, ""}, one
        else:
            assert name.lower() in names and name != project["name"], one


def test_recipes_in_docs_exist():
    for path in DOCS:
        for name in re.findall(r"--recipe ([\w-]+)(?![\w./-])", path.read_text()):
            assert (RECIPES / f"{name}.yaml").is_file(), f"{path}: {name}"


def commands():
    """Verbs and options of the package's commands, where docs and recipes write them."""
    found = {}
    for path in (*DOCS, *sorted(RECIPES.glob("*.yaml"))):
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        for written in re.findall(rf"(?:puzzle |python -m puzzle_jax\.)((?:{'|'.join(VERBS)})\b[^`#\n]*)", text):
            verb, *rest = written.split()
            sub = rest[:1] if (rest and rest[0].isidentifier()) or rest[:1] in SUBS else []
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            found[verb, *sub, *sorted(options)] = (path.name, [verb, *sub], sorted(options))
    return list(found.values())


SUBS = (["distill-blocks"],)
COMMANDS = commands()


def test_docs_have_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("page", "verbs", "options"), COMMANDS, ids=lambda value: " ".join(value)[:60])
def test_commands_in_docs_have_only_options_that_exist(page, verbs, options):
    # Options are checked in order, so the last one is named only if all others exist.
    named = [f"{option}=1" for option in options if option not in READ]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([*verbs, *named, "--zzzz=1"]) == 2
    assert "there is no option --zzzz" in said.getvalue(), (page, verbs, options, said.getvalue())
