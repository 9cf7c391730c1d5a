"""The stand-alone solver of block libraries: what it prints, and how it refuses what cannot be solved."""

import itertools
import json
import math
import random
import subprocess
import sys
from typing import Any

import pytest

from puzzle_jax.program.command import read_library
from puzzle_jax.search.__main__ import main

KL, MS, MIB = "metrics.kl_div", "stats.runtime_ms", "stats.memory_mib"


def library(layers=4, alternatives=4, seed=0):
    source = random.Random(seed)
    return {
        f"block_{layer}": {
            f"a{a}": {
                "metrics": {"kl_div": round(a * a * source.random(), 3)},
                "stats": {"runtime_ms": round(5 - a * source.random(), 3), "memory_mib": 8 - a},
            }
            for a in range(alternatives)
        }
        for layer in range(layers)
    }


def totals(blocks, choice):
    numbers = [blocks[layer][name] for layer, name in choice.items()]
    pairs = [("metrics", "kl_div"), ("stats", "runtime_ms"), ("stats", "memory_mib")]
    return {f"{a}.{b}": sum(n[a][b] for n in numbers) for a, b in pairs}


def all_totals(blocks):
    for names in itertools.product(*blocks.values()):
        yield totals(blocks, dict(zip(blocks, names, strict=True)))


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tool on a library (an object or text): exit code, stdout, stderr."""

    def call(blocks, *arguments, minimize=KL):
        path = tmp_path / "library.json"
        path.write_text(blocks if isinstance(blocks, str) else json.dumps(blocks))
        code = main(["solve", "--library", str(path), "--minimize", minimize, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_solutions_as_json_are_the_best(run):
    blocks = library()
    code, out, err = run(blocks, "--at-most", f"{MS}=17", "--at-least", f"{MIB}=20", "--solutions", "3", "--json")
    assert code == 0 and err == ""
    solutions = json.loads(out)["solutions"]
    met = sorted(t[KL] for t in all_totals(blocks) if t[MS] <= 17 and t[MIB] >= 20)
    assert [s["value"] for s in solutions] == pytest.approx(met[:3], rel=1e-3)
    for solution in solutions:
        assert list(solution) == ["choice", "value", "costs", "status", "gap"]
        assert solution["costs"] == pytest.approx(totals(blocks, solution["choice"]))
        assert solution["status"] == "optimal" and 0 <= solution["gap"] <= 1e-4


def test_min_distance_and_gap(run):
    blocks = library()
    _, out, _ = run(blocks, "--solutions", "2", "--min-distance", "3", "--gap", "0", "--json")
    first, second = (s["choice"] for s in json.loads(out)["solutions"])
    assert sum(first[layer] != second[layer] for layer in blocks) >= 3


def test_table_shows_choices_and_sums(run):
    code, out, _ = run(library(2, 2), "--at-most", f"{MIB}=15")
    assert code == 0
    assert all(word in out for word in (f"{KL} (minimised)", MS, MIB, "optimal", "block_0", "block_1", "a1"))


def test_names_that_look_like_markup_are_shown_as_they_are(run):
    code, out, _ = run({"[bold]x[/bold]": {"[red]": {"kl": 1}}}, minimize="kl")
    assert code == 0 and "[bold]x[/bold]" in out and "[red]" in out


@pytest.mark.parametrize("bounds", ["20,24,1,32", "20:32:4"])
def test_sweep_is_the_frontier(run, bounds):
    blocks = library()
    code, out, _ = run(blocks, "--sweep", f"{MIB}={bounds}", "--json", "--at-most", f"{MS}=19")
    assert code == 0
    found = json.loads(out)
    assert found["key"] == MIB
    values = [20, 24, 28, 32] if ":" in bounds else [1, 20, 24, 32]
    assert sorted(point["at_most"] for point in found["frontier"]) == values
    for point in found["frontier"]:
        met = [t[KL] for t in all_totals(blocks) if t[MIB] <= point["at_most"] and t[MS] <= 19]
        if met:
            assert point["solution"]["value"] == pytest.approx(min(met), rel=1e-3)
        else:
            assert point["solution"] is None


def test_sweep_table_shows_what_is_infeasible(run):
    code, out, _ = run(library(), "--sweep", f"{MIB}=1,20")
    assert code == 0 and "infeasible" in out and "optimal" in out and MIB in out and KL in out


def test_without_jax(tmp_path):
    path = tmp_path / "library.json"
    path.write_text(json.dumps(library(2, 2)))
    code = f"""
import sys
from puzzle_jax.search.__main__ import main
assert main(["solve", "--library", {str(path)!r}, "--minimize", {KL!r}, "--json"]) == 0
assert not {{"jax", "matplotlib"}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["solutions"][0]["value"] == 0.0


def refused(result, *words):
    """Exit code 2, nothing on stdout, one sentence on stderr that holds the words."""
    code, out, err = result
    assert code == 2 and out == "", (code, out, err)
    assert err.startswith("puzzle search solve: ") and err.endswith("\n")
    assert err.count("\n") == 1 and "Traceback" not in err and len(err) < 1500 and err.isascii(), err
    for word in words:
        assert str(word) in err, (word, err)


TEXTS = {
    "": "cannot be read as JSON",
    "{": "cannot be read as JSON",
    "[": "cannot be read as JSON",
    "{'a': 1}": "cannot be read as JSON",
    '{"a": {"x": {"kl": 1}},}': "cannot be read as JSON",
    '{"a": {"x": {"kl": 01}}}': "cannot be read as JSON",
    "\x00": "cannot be read as JSON",
    "[" * 100_000: "cannot be read as JSON",
    '{"a":' * 100_000: "cannot be read as JSON",
    '{"a": {"x": {"kl": ' + "9" * 5000 + "}}}": "cannot be read as JSON",
    "null": "holds None",
    "true": "holds True",
    "7": "holds 7",
    '"text"': "holds 'text'",
    '"' + "long" * 10_000 + '"': "holds 'long",
    "[]": "holds []",
    '[{"a": {"x": {"kl": 1}}}]': "must hold an object",
    "NaN": "holds nan",
    "{}": "the library is empty",
    '{"a": {"x": {"kl": 1}}, "a": {"y": {"kl": 2}}}': "has 'a' twice",
    '{"a": {"x": {"kl": 1}, "x": {"kl": 2}}}': "has 'x' twice",
    '{"a": {"x": {"kl": 1, "kl": 2}}}': "has 'kl' twice",
    '{"a": {"x": {"m": {"kl": 1, "kl": 1}}}}': "has 'kl' twice",
    '{"a": ' + '{"b":' * 40 + "1" + "}" * 41: "nested deeper than 32 levels",
    '{"a": ' + '{"b":' * 700 + "1" + "}" * 701: "nested deeper than 32 levels",
}

VALUES = {
    "NaN": "nan",
    "Infinity": "inf",
    "-Infinity": "-inf",
    "1e999": "inf",
    "1e300": "1e+300",
    "-1e101": "-1e+101",
    "1" + "0" * 200: "10000",
    "null": "has no 'kl'",
    "true": "True",
    '"1.5"': "'1.5'",
    '"' + "x" * 100_000 + '"': "'xxx",
    '"two\\nlines"': "two\\nlines",
    "[1]": "[1]",
    "{}": "{}",
    '{"mean": 1}': "{'mean': 1}",
}

STRUCTURES = ["null", "[]", "3", "{}", '"text"', "NaN"]


def test_texts_that_are_no_library(run):
    for text, words in TEXTS.items():
        refused(run(text, minimize="kl"), "library.json", words)


def test_values_that_are_no_number(run):
    """Each is at a random place of an otherwise sound library, and the message names that place."""
    source = random.Random(0)
    for value, words in VALUES.items():
        for key in ("kl", "ms"):
            layer, a = source.randrange(5), source.randrange(3)
            blocks: dict[str, Any] = {f"L{i}": {f"a{j}": {"kl": j, "ms": 3 - j} for j in range(3)} for i in range(5)}
            blocks[f"L{layer}"][f"a{a}"][key] = "HERE"
            text = json.dumps(blocks).replace('"HERE"', value)
            refused(
                run(text, "--at-most", "ms=9", minimize="kl"),
                "library.json",
                f"'a{a}'",
                f"'L{layer}'",
                key,
                words.replace("'kl'", f"'{key}'"),
            )


def test_structures_that_are_no_alternatives(run):
    for at, structure in itertools.product(("L1", "a1"), STRUCTURES):
        blocks: dict[str, Any] = {f"L{i}": {f"a{j}": {"kl": j} for j in range(3)} for i in range(3)}
        if at == "L1":
            blocks["L1"] = "HERE"
        else:
            blocks["L1"]["a1"] = "HERE"
        refused(run(json.dumps(blocks).replace('"HERE"', structure), minimize="kl"), "library.json", "'L1'", at)


SETTINGS = [
    (["--at-most", "stats"], "--at_most has 'stats', but must be a mapping of names to numbers"),
    (["--at-most", "=3"], "--at_most has '=3'"),
    (["--at-most", f"{MS}="], f"--at_most has '{MS}='"),
    (["--at-most", f"{MS}=fast"], f"at_most is {{'{MS}': 'fast'}}, but must be a mapping of names to numbers"),
    (["--at-most", f"{MS}=nan"], f"at_most has nan for '{MS}', but must have finite numbers"),
    (["--at-least", f"{MS}=inf"], f"at_least has inf for '{MS}'"),
    (["--at-least", f"{MS}=1e200"], f"at_least has 1e+200 for '{MS}'"),
    (["--at-least", f"{MS}={'9' * 6000}"], f"at_least has inf for '{MS}'"),
    (["--at-most", "stats.speed=3"], "has no 'stats.speed'"),
    (["--at-most", "stats=3"], "'stats' of 'a0'"),
    (["--solutions", "0"], "num_solutions is 0"),
    (["--solutions", "-2"], "num_solutions is -2"),
    (["--solutions", "many"], "solutions is 'many', but must be a whole number"),
    (["--min-distance", "0"], "min_distance is 0"),
    (["--min-distance", "5"], "min_distance is 5"),
    (["--time-limit", "0"], "time_limit is 0"),
    (["--time-limit", "nan"], "time_limit is nan"),
    (["--time-limit", "soon"], "time_limit is 'soon', but must be a number"),
    (["--gap", "-1"], "gap is -1"),
    (["--gap", "nan"], "gap is nan"),
    (["--gap", "inf"], "gap is inf"),
    (["--sweep", MIB], f"sweep is '{MIB}'"),
    (["--sweep", f"{MIB}=1,,2"], "sweep is"),
    (["--sweep", f"{MIB}=9:3:4"], "sweep is"),
    (["--sweep", f"{MIB}=3:9:1"], "sweep is"),
    (["--sweep", f"{MIB}=3:9:1000000000"], "sweep is"),
    (["--sweep", f"{MIB}=3:9:x"], "sweep is"),
    (["--sweep", f"{MIB}=3:9"], "sweep is"),
    (["--sweep", f"{MIB}=20", "--solutions", "2"], "solutions is 2"),
    (["--sweep", "size=20"], "has no 'size'"),
    (["--recipe", "x.yaml"], "recipe is 'x.yaml', but there is no such file"),
    (["--at-most"], "--at-most needs a value"),
]


def test_impossible_settings(run):
    for arguments, words in SETTINGS:
        refused(run(library(), *arguments), words)


def test_unknown_objective_names_those_that_are_known(run):
    refused(run(library(), minimize="kl"), "has no 'kl'", KL, MS, MIB)


def test_files_that_cannot_be_read(tmp_path, capsys):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.json", tmp_path, binary):
        code = main(["solve", f"--library={path}", "--minimize", "kl"])
        captured = capsys.readouterr()
        refused((code, captured.out, captured.err), path.name, "cannot be read")


def test_contradictions_name_what_conflicts_and_the_best_value(run):
    """Random limits that no choice meets: the values named are those that enumeration finds."""
    source, seen = random.Random(1), 0
    for seed in range(60):
        blocks = library(layers=3, alternatives=3, seed=seed)
        every = list(all_totals(blocks))
        most, least = round(source.uniform(2, 14), 2), source.randrange(14, 27)
        if any(t[MS] <= most and t[MIB] >= least for t in every):
            continue
        seen += 1
        result = run(blocks, "--at-most", f"{MS}={most}", "--at-least", f"{MIB}={least}")
        fastest, largest = min(t[MS] for t in every), max(t[MIB] for t in every)
        if fastest <= most and largest >= least:
            reachable = min(t[MS] for t in every if t[MIB] >= least)
            refused(result, "cannot hold together", repr(MS), repr(MIB), f"{MS!r} can be {reachable:.3g}"[:-1])
        else:
            refused(result, "cannot be met: the best possible value is", repr(MS) if fastest > most else repr(MIB))
            assert f"{fastest:.3g}"[:-1] in result[2] or largest < least
    assert seen > 20


def test_numbers_of_very_different_size(run):
    blocks = {
        f"L{i}": {
            "a": {"kl": 1e-90 * (i + 1), "bytes": 10**15 + 1, "ms": 5e-324},
            "b": {"kl": 0.0, "bytes": 10**15 + 2, "ms": 0},
        }
        for i in range(3)
    }
    code, out, _ = run(blocks, "--at-most", f"bytes={3 * 10**15 + 4}", "--gap", "0", "--json", minimize="kl")
    [solution] = json.loads(out)["solutions"]
    assert code == 0 and solution["choice"] == {"L0": "a", "L1": "a", "L2": "b"} and math.isfinite(solution["gap"])
    refused(run(blocks, "--at-most", "bytes=1e100", "--at-least", "ms=1e-300", minimize="kl"), "'ms' at least 1e-300")


def test_reading_leaves_text_and_unused_numbers_alone(tmp_path):
    path = tmp_path / "library.json"
    path.write_text('{"a": {"x": {"kl": 1, "note": "text", "spread": NaN}}}')
    assert read_library(path)["a"]["x"]["note"] == "text"


def test_there_are_a_hundred_bad_libraries():
    assert len(TEXTS) + 2 * len(VALUES) + 2 * len(STRUCTURES) + len(SETTINGS) + 20 >= 100
