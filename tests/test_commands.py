"""Errors of every command: what a user can fix is one sentence and exit code 2, and a bug keeps its traceback."""

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from puzzle_jax.cli import main
from puzzle_jax.commands import BROKEN_PIPE, did_you_mean, guarded, mendable
from puzzle_jax.errors import ConfigError, PuzzleError, PuzzleWarning
from puzzle_jax.settings.files import ASSETS
from puzzle_jax.settings.messages import describe
from puzzle_jax.settings.verbs import Verb, parse, run_table, run_verb


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PuzzleError("no such thing"), "x: no such thing"),
        (OSError(errno.ENOSPC, "full", "a/b"), f"x: a/b: {os.strerror(errno.ENOSPC)}"),
        (OSError(errno.EROFS, "ro", "a", None, "b"), f"x: a to b: {os.strerror(errno.EROFS)}"),
        (PermissionError(errno.EACCES, "no", "a"), f"x: a: {os.strerror(errno.EACCES)}"),
        (NotADirectoryError(errno.ENOTDIR, "no", "a/b"), f"x: a/b: {os.strerror(errno.ENOTDIR)}"),
        (ValueError("embedded null byte"), "x: a path holds a NUL, which is no part of any path"),
        (MemoryError(), "x: the machine's memory does not suffice; smaller batches or fewer processes take less"),
        (OSError("100000 requested and 992 written"), f"x: {os.strerror(errno.ENOSPC)}"),  # numpy
        (ValueError("I/O error: gone (os error 28)"), f"x: {os.strerror(errno.ENOSPC)}"),  # safetensors
        (FileNotFoundError("No such file or directory: /nowhere"), "x: No such file or directory: /nowhere"),
        (RecursionError("maximum"), "x: what was given is nested too deeply"),
        (
            ValueError("tensorstore: No space left on device [a/d/1]"),
            "x: a file cannot be written or read: No space left",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(error, sentence, capsys):
    assert guarded("x", raising(error)) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("t"), KeyError("k"), ValueError("v"), AssertionError(), OSError("o")])
def test_bugs_keep_their_traceback(error):
    assert mendable(error) is None
    with pytest.raises(type(error)):
        guarded("x", raising(error))


def test_a_reader_that_went_away_and_an_interrupt_have_codes_of_their_own(capfd):
    assert guarded("x", raising(BrokenPipeError(errno.EPIPE, "gone"))) == BROKEN_PIPE
    assert guarded("x", raising(KeyboardInterrupt()), "nothing was written") == 130
    assert capfd.readouterr().err == "x: interrupted; nothing was written\n"


WARNING = """
import warnings
from puzzle_jax.commands import guarded
from puzzle_jax.errors import PuzzleWarning
def run():
    for _ in range(2):
        warnings.warn("mind the gap", PuzzleWarning)
raise SystemExit(guarded("x", run))
"""


def test_a_warning_is_one_line_each_once_and_recorded_where_somebody_records():
    done = subprocess.run([sys.executable, "-c", WARNING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "x: warning: mind the gap\n")
    with pytest.warns(PuzzleWarning, match="mind the gap"):
        guarded("x", lambda: warnings.warn("mind the gap", PuzzleWarning, stacklevel=1))


# Options --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
      tasks: Tasks to ask.
    """

    tasks: tuple[str, ...] = ()
    widths: tuple[int, ...] | None = None
    min_speedup: float = 1.0
    limits: dict[str, int] = field(default_factory=dict)
    method: Literal["exact", "lens"] = "exact"


@dataclass(frozen=True)
class Settings:
    target: Section = field(default_factory=Section)
    files: tuple[Path, ...] | Path = ()
    out: Path | None = None
    paths: tuple[Path, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    named: Mapping[str, Path] = field(default_factory=dict)
    lengths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    loud: bool = False


VERB = Verb("x", "What it does.", f"{__name__}:Settings", f"{__name__}:run", ("target.tasks", "out"), "--out DIR")
ran: list[Settings] = []


def run(settings):
    ran.append(settings)
    return 3


def parsed(*arguments):
    return parse(VERB, arguments)


def test_one_value_is_enough_where_a_list_is_asked_for(tmp_path):
    assert parsed("--target.tasks", "chain").target.tasks == ("chain",)
    assert parsed("--target.tasks=chain,add").target.tasks == ("chain", "add")
    assert parsed("--target.tasks", "[chain, add]").target.tasks == ("chain", "add")
    assert parsed("--target.widths", "8").target.widths == (8,) and parsed("--target.widths=8,4").target.widths == (
        8,
        4,
    )
    assert parsed("--target.widths", "null").target.widths is None
    assert parsed("--paths", "a,b.jsonl").paths == (Path("a,b.jsonl"),)  # a path may hold a comma
    assert parsed("--files", "a.jsonl").files == Path("a.jsonl")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: {tasks: chain, widths: 8}\npaths: a\n")
    found = parsed("--recipe", str(recipe))
    assert (found.target.tasks, found.target.widths, found.paths) == (("chain",), (8,), (Path("a"),))


def test_embedded_checkpoints_have_names_wherever_a_path_is_asked_for(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("out: embedded:tiny\nfiles: [a, 'embedded:tiny']\nnamed: {b: embedded:tiny}\n")
    tiny = ASSETS / "tiny"
    for found in (
        parsed("--recipe", str(recipe)),
        parsed("--out", "embedded:tiny", "--files", "[a, embedded:tiny]", "--named", "b=embedded:tiny"),
    ):
        assert (found.out, found.files, dict(found.named)) == (tiny, (Path("a"), tiny), {"b": tiny})
    assert parsed("--paths=embedded:tiny").paths == (tiny,)
    assert parsed("--target.tasks", "embedded:tiny").target.tasks == ("embedded:tiny",)  # no path
    with pytest.raises(ConfigError, match=r"--out is 'embedded:tin', but the embedded checkpoints are tiny.*mean tiny"):
        parsed("--out", "embedded:tin")


def test_the_short_forms_and_yaml_say_the_same(tmp_path):
    section = Section(("chain", "reasoning-gym:sum"), (8,), 2.0, {"low": 3}, "lens")
    short = "min_speedup=2,limits={low: 3},method=lens"
    for arguments in (
        ["--target", short, "--target.tasks", "chain,reasoning-gym:sum", "--target.widths", "8"],
        ["--target.tasks", "chain", "reasoning-gym:sum", "--target.widths=8", "--target", short],
        ["--target", "{tasks: [chain, 'reasoning-gym:sum'], widths: 8, min_speedup: 2, limits: low=3, method: lens}"],
        [
            *("--target.min-speedup", "2", "--target", "tasks=chain", "--target.tasks=chain,reasoning-gym:sum"),
            *("--target.limits", "low=3", "--target.widths", "[8]", "--target.method", "lens"),
        ],
    ):
        assert parsed(*arguments).target == section, arguments
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: {tasks: 'chain,reasoning-gym:sum', widths: 8}\nweights: [b, 'c:d/e.f']\n")
    found = parsed("--recipe", str(recipe), "--target", short)
    assert found.target == section and found.weights == {"b": 1.0, "c:d/e.f": 1.0}


def test_mappings_hold_names_with_colons_and_values_with_equals_signs():
    assert parsed("--named", "a=x=y/z,b=c,d").named == {"a": Path("x=y/z"), "b": Path("c,d")}
    assert parsed("--named", "a=x", "b=y").named == {"a": Path("x"), "b": Path("y")}
    assert parsed("--weights", "x:y/z.jsonl=2,b=1").weights == {"x:y/z.jsonl": 2.0, "b": 1.0}
    assert parsed("--weights", "x:y/z.jsonl,b").weights == {"x:y/z.jsonl": 1.0, "b": 1.0}
    assert parsed("--lengths", "a=3:4,b=5:6").lengths == {"a": (3, 4), "b": (5, 6)}
    with pytest.raises(ConfigError, match="--weights has 'b' twice, but must name each once"):
        parsed("--weights", "b,b")


def test_flags_need_no_value():
    assert [parsed(*given).loud for given in ([], ["--loud"], ["--no-loud"], ["--loud", "false"], ["--loud=true"])] == [
        False, True, False, False, True,
    ]  # fmt: skip


def test_a_mapping_replaces_a_recipe_and_its_keys_add_to_it(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: {limits: {low: 1, high: 2}}\n")
    given = ["--recipe", str(recipe)]
    assert parsed(*given, "--target.limits", "low=3").target.limits == {"low": 3}
    assert parsed(*given, "--target.limits.low", "3").target.limits == {"low": 3, "high": 2}
    assert parsed("--target.limits=low=3", "--target.limits=high=4").target.limits == {"low": 3, "high": 4}


def test_help_shows_what_matters_and_help_all_the_rest(capsys):
    assert run_verb(VERB, ["--help"]) == run_verb(VERB, ["-h"]) == 0
    few = capsys.readouterr().out
    assert run_verb(VERB, ["--help-all"]) == 0
    everything = capsys.readouterr().out
    assert "--target.tasks A,B,..." in few and "Tasks to ask" in few and "puzzle x --out DIR" in few
    assert "--target.method" not in few and "--target.method exact|lens" in everything
    assert "(default: exact)" in everything and "--weights K=V,..." in everything


def test_a_printed_configuration_is_a_recipe(tmp_path, capsys):
    given = ["--target", "tasks=chain,min_speedup=2", "--out", "here", "--weights", "a=2", "--loud"]
    assert run_verb(VERB, [*given, "--print_config"]) == 0
    recipe = tmp_path / "r.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert parsed("--recipe", str(recipe)) == parsed(*given)


def test_a_verb_runs_with_its_settings_and_ends_with_what_it_returns():
    assert run_verb(VERB, ["--loud"]) == 3
    assert ran.pop() == Settings(loud=True) and not ran


def test_the_command_line_overrides_a_recipe_wherever_it_stands(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: {min_speedup: 2.0}\n")
    for arguments in (
        ["--target.min_speedup", "3", "--recipe", str(recipe)],
        [f"--recipe={recipe}", "--target.min_speedup=3"],
    ):
        assert parsed(*arguments).target.min_speedup == 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target.min_speed", "2"], r"there is no option --target.min_speed; did you mean --target.min_speedup\?"),
        (["--target.min_sp=2"], r"there is no option --target.min_sp; did you mean --target.min_speedup\?"),
        (["--min_speedup", "2"], r"there is no option --min_speedup; did you mean --target.min_speedup\?"),
        (["--target.taks", "a"], r"did you mean --target.tasks\?"),
        (["--zebra", "1"], r"there is no option --zebra; --help lists those there are"),
        (["--target.tasks", "[" * 3000], "--target.tasks is nested too deeply"),
        (["--target.limits", "{a: &x 1, b: *y}"], "--target.limits cannot be read as YAML"),
    ],
)
def test_options_that_do_not_exist_say_what_was_perhaps_meant(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)


def test_keys_of_a_mapping_are_options_too():
    assert parsed("--target.limits.low", "3").target.limits == {"low": 3}
    assert parsed("--target.limits.a/b-c.d", "3").target.limits == {"a/b-c.d": 3}
    assert parsed("--target.limits", "low=3,high=4", "--target.limits.low=5").target.limits == {"low": 5, "high": 4}


def test_fields_that_do_not_exist_are_refused_by_file_with_what_there_is(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("target: {task: a}\n")
    with pytest.raises(ConfigError, match=r"r.yaml has the field target.task, which .* did you mean target.tasks\?"):
        parsed("--recipe", str(recipe))
    recipe.write_text("zebra: 1\n")
    with pytest.raises(ConfigError, match=r"has the field zebra, .*; a recipe has target, files, out, paths"):
        parsed("--recipe", str(recipe))


def test_options_are_neither_abbreviated_nor_gathered_silently(capsys):
    for arguments, message in (
        (["--ou", "a"], r"there is no option --ou; did you mean --out\?"),
        (["a"], r"'a' is one argument too many"),
        (["-x"], r"there is no option -x"),
    ):
        with pytest.raises(ConfigError, match=message):
            parsed(*arguments)
    table = {"inspect": VERB, "export": VERB}
    assert run_table("convert", table, ["inspct"]) == run_table("convert", table, ["--inspect"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "puzzle convert: verb is 'inspct', but must be one of inspect, export; did you mean inspect?"
    assert said[1].startswith("puzzle convert: there is no option --inspect, but must be one of inspect, export")


def test_the_closest_name_is_the_one_that_is_offered():
    assert did_you_mean("serch", ["search", "generate"]) == "; did you mean search?"
    assert did_you_mean("zebra", ["search", "generate"]) == ""


@pytest.mark.parametrize("verb", ["search", "generate", "evaluate", "convert_hf", "train"])
def test_every_verb_refuses_an_unknown_option_in_one_sentence(verb, capsys):
    assert main([verb, "--parnt", "x"]) == 2
    said = capsys.readouterr().err
    assert "--parnt" in said and said.count("\n") == 1


def test_a_terminal_that_has_not_all_characters_shows_escapes():
    program = "from puzzle_jax.commands import guarded\nraise SystemExit(guarded('x', lambda: print('a\u00e9')))"
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ascii_only)
    assert (done.returncode, done.stdout, done.stderr) == (0, "a\\xe9\n", "")


def test_what_may_be_null_is_told_apart_from_its_elements():
    assert describe(int | None) == "a whole number or null" and describe(type(None)) == "null"
    values = "a list of values, each a whole number or"
    assert describe(tuple[int | Literal["full"], ...] | None) == f"{values} full, or null"
    assert describe(tuple[int | None, ...]) == f"{values} null"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target.min_speedup", "fast"], "target.min_speedup is 'fast', but must be a number"),
        (["--target.widths", "wide"], "target.widths is .*, but must be a list of whole numbers or null"),
        (["--target.tasks", "{a: b}"], "target.tasks is .*, but must be a list of texts"),
        (["--target", "7"], "--target is '7', but must be a mapping of tasks, widths, min_speedup, limits, method"),
        (
            ["--target.limits", "{low: few}"],
            r"target.limits is {'low': 'few'}, but must be a mapping of names to whole numbers",
        ),
        (["--target.method", "exat"], r"target.method is 'exat', but must be one of exact, lens; did you mean exact\?"),
        (["--out", "a\0b"], r"--out is 'a\\x00b', but no setting holds a NUL"),
        (["--target.limits", "{class_path: os.path}"], "--target.limits names a class of Python"),
        (
            ["--target.limits", "low=x"],
            "target.limits is {'low': 'x'}, but must be a mapping of names to whole numbers",
        ),
        (["--target.limits", "low"], "--target.limits has 'low', but must be .*, of the form NAME=VALUE,NAME=VALUE"),
        (["--target.limits", "low=1,low=2"], "--target.limits names 'low' twice"),
        (["--target", "min_speed=3"], r"--target has the field target.min_speed, .*; did you mean target.min_speedup"),
        (["--target.widths", "1" + "0" * 31], r"--target.widths is '10+', but no setting is as large as that"),
        (["--target.min_speedup"], "--target.min_speedup needs a value"),
        (["--target.min_speedup", "null"], "--target.min_speedup is None, but must have a value"),
    ],
)
def test_values_of_settings_are_refused_in_words(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        parsed(*arguments)
    assert "class '" not in str(error.value) and "Parser" not in str(error.value)


def test_an_output_that_nobody_reads_ends_quietly():
    command = f"{sys.executable} -m puzzle_jax.search estimate --list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] in ("0", str(BROKEN_PIPE))
