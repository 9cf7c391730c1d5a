"""Whole evaluations of random two-layer models: what is written, resumed and refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.evaluate import journal, speeds, throughput
from puzzle_jax.evaluate import models as evaluated_models
from puzzle_jax.evaluate import run as run_module
from puzzle_jax.evaluate.__main__ import main
from puzzle_jax.evaluate.run import Evaluation
from puzzle_jax.evaluate.settings import Settings
from puzzle_jax.generate.traces import append_trace, read_traces
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.support import chat_config, random_params

CONFIG = chat_config()
SETTINGS = {
    "--tasks": "chain,add",
    "--efforts": "low,high",
    "--problems": "3",
    "--max-tokens": "low=4,high=6",
    "--slots": "4",
    "--scenarios": "tiny=9:3",
    "--cache-memory": "100KiB",
    "--max-batch": "2",
    "--rounds": "3",
    "--bootstrap": "40",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two checkpoints of one shape, so that they share compiled programs."""
    out = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("parent", "child")):
        params = random_params(CONFIG, seed)
        save_checkpoint(out / name, CONFIG, params, config_base={}, extra_files=chat_files())
    return out


def evaluate(models: Path, out: Path, *flags: str, names: tuple[str, ...] | None = None, **changes: str) -> int:
    settings = {**SETTINGS, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    options = [part for item in settings.items() for part in item]
    named = names if names is not None else (f"parent={models}/parent", f"child={models}/child")
    return main(["--models", *named, "--out", str(out), *options, *flags])


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert evaluate(models, out) == 0
    return out


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_everything_is_written(finished, models):
    assert set(snapshot(finished)) == {
        "answers/child.jsonl",
        "answers/parent.jsonl",
        "report.html",
        "evaluation.json",
        "frontier.png",
        "report.md",
        "settings.json",
        "throughput.jsonl",
    }
    assert (finished / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert evaluation["reference"] == "parent"
    for name in ("parent", "child"):
        answers = read_traces(finished / "answers" / f"{name}.jsonl")
        assert sorted((a.task, a.effort) for a in answers) == sorted(
            [(task, effort) for effort in ("low", "high") for task in ("chain", "chain", "add")]
        )
        for effort in ("low", "high"):
            own = [a for a in answers if a.effort == effort]
            summary = evaluation["summaries"][name][effort]["all"]
            assert summary["answers"] == 3 and summary["mean_tokens"] == sum(len(a.completion) for a in own) / 3
    workloads = evaluation["throughput"]["workloads"]
    assert list(workloads) == ["tiny", "low", "high"]
    assert all(entry["child"]["tokens_per_second"]["rounds"] == 3 for entry in workloads.values())
    # 60 values of 4 bytes at each of 16 + 64 positions.
    assert workloads["tiny"]["parent"]["batch"] == min(2, 102400 // (80 * 60 * 4))


def test_the_report_holds_every_table_and_a_verdict(finished):
    text = (finished / "report.md").read_text()
    for part in (
        "| parent, low |",
        "| child, high |",
        "Compared with parent",
        "tiny (9 in, 3 out), child",
        "frontier.png",
    ):
        assert part in text, part
    assert "the smallest gap is" in text or "has no answer" in text


def test_a_second_run_asks_and_measures_nothing(finished, models, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing is missing")

    before = snapshot(finished)
    monkeypatch.setattr(run_module, "answer_questions", never)
    monkeypatch.setattr(throughput, "_seconds", never)
    assert evaluate(models, finished) == 0
    assert snapshot(finished) == before


def test_an_interrupted_run_goes_on_to_the_same_answers(finished, models, tmp_path, monkeypatch, capsys):
    """Ctrl-C after the fourth answer of the second model, then part of a line as a kill would leave it."""
    out, asked = tmp_path / "out", []

    def interrupt(file, trace):
        append_trace(file, trace)
        asked.append(trace)
        if len(asked) == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(journal, "append_trace", interrupt)
    assert evaluate(models, out, "--no-throughput") == 130
    said = capsys.readouterr().err
    assert "interrupted; answers are kept, and the same command goes on from them" in said and said.count("\n") == 1
    path = out / "answers" / "child.jsonl"
    assert path.read_bytes().count(b"\n") == 4 and not (out / "evaluation.json").exists()
    with open(path, "ab") as file:
        file.write(path.read_bytes().splitlines()[0][:50])

    assert evaluate(models, out, "--no-throughput") == 0
    assert len(asked) == 12
    for name in ("parent", "child"):
        kept, whole = (read_traces(directory / "answers" / f"{name}.jsonl") for directory in (out, finished))

        def order(trace):
            return trace.task, trace.problem_seed, trace.effort

        assert sorted(kept, key=order) == sorted(whole, key=order)
    results = [json.loads((directory / "evaluation.json").read_text()) for directory in (out, finished)]
    assert results[0]["summaries"] == results[1]["summaries"] and results[0]["overall"] == results[1]["overall"]
    assert results[0]["throughput"] is None and results[0]["points"] is None
    assert not (out / "frontier.png").exists()


def test_an_interrupted_measurement_keeps_its_rounds(finished, models, tmp_path, monkeypatch):
    out, ran = tmp_path / "out", []
    shutil.copytree(finished, out)
    (out / "throughput.jsonl").unlink()

    def seconds(*_):
        ran.append(1)
        if len(ran) == 13:  # after 2 first runs and 3 rounds of 2 models, 2 first runs and 1 round
            raise KeyboardInterrupt
        return float(len(ran))

    monkeypatch.setattr(throughput, "_seconds", seconds)
    assert evaluate(models, out) == 130
    rows = [json.loads(line) for line in (out / "throughput.jsonl").read_text().splitlines()]
    assert [row["workload"] for row in rows] == ["tiny"] * 3 + ["low"]
    assert evaluate(models, out) == 0
    assert len(ran) == 13 + (2 + 2 * 2) + (2 + 3 * 2)
    after = [json.loads(line) for line in (out / "throughput.jsonl").read_text().splitlines()]
    assert after[:4] == rows and [row["workload"] for row in after[4:]] == ["low"] * 2 + ["high"] * 3
    # Other scenarios of the same models are measured in addition to those already measured.
    assert evaluate(models, out, scenarios="tiny=9:3,wide=12:2") == 0
    assert len(ran) == 27 + 2 + 3 * 2


def test_models_that_do_not_fit_together_are_measured_one_after_the_other(finished, models, tmp_path, monkeypatch):
    out, loaded, ran = tmp_path / "out", [], []
    shutil.copytree(finished, out)
    (out / "throughput.jsonl").unlink()
    monkeypatch.setattr("puzzle_jax.evaluate.models.device_memory", lambda: 1)  # too small for two models
    load = evaluated_models.load_weights

    def counted(description, *given):
        loaded.append(description.directory.name)
        return load(description, *given)

    def seconds(*_):
        ran.append(1)
        if (
            len(ran) == 15
        ):  # for the parent, 3 workloads with a first run and 3 rounds; for the child, a first run and 1 round
            raise KeyboardInterrupt
        return float(len(ran))

    monkeypatch.setattr(evaluated_models, "load_weights", counted)
    monkeypatch.setattr(throughput, "_seconds", seconds)
    assert evaluate(models, out) == 130
    rows = [json.loads(line) for line in (out / "throughput.jsonl").read_text().splitlines()]
    assert [(row["workload"], *row["tokens_per_second"]) for row in rows] == [
        *[(workload, "parent") for workload in ("tiny", "low", "high") for _ in range(3)],
        ("tiny", "child"),
    ]
    assert loaded == ["parent", "child"]
    assert evaluate(models, out) == 0
    assert loaded == ["parent", "child", "child"] and len(ran) == 15 + (1 + 2) + 2 * (1 + 3)
    throughputs = json.loads((out / "evaluation.json").read_text())["throughput"]["workloads"]
    measured = [json.loads(line) for line in (out / "throughput.jsonl").read_text().splitlines()]
    of_child = [row["tokens_per_second"]["child"] for row in measured if "child" in row["tokens_per_second"]]
    assert throughputs["tiny"]["child"]["tokens_per_second"]["median"] == sorted(of_child[:3])[1]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"seed": "1"}, "seed 0 -> 1"),
        ({"temperature": "0.5"}, "temperature 1.0 -> 0.5"),
        ({"max_tokens": "low=4,high=7"}, "max_tokens.high 6 -> 7"),
        ({"names": ("parent={0}/parent",)}, "models.child "),
        ({"names": ("parent={0}/parent", "child={0}/parent")}, "models.child "),
    ],
)
def test_other_settings_and_other_weights_are_refused(finished, models, capsys, changes: dict[str, Any], message):
    before = snapshot(finished)
    if "names" in changes:
        changes = {"names": tuple(name.format(models) for name in changes["names"])}
    assert evaluate(models, finished, **changes) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "holds another run" in said
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"tasks": "poetry"}, "task is 'poetry'"),
        ({"tasks": "chain,chain"}, "tasks is 'chain,chain'"),
        ({"efforts": "extreme"}, "effort is 'extreme'"),
        ({"efforts": ","}, "efforts is ''"),
        ({"problems": "1"}, "problems is 1, but must be at least 1 for each of the 2 tasks"),
        ({"problems": "many"}, "problems is 'many', but must be a whole number"),
        ({"max_tokens": "low"}, "max_tokens is 'low', but must be a mapping of names to whole numbers"),
        ({"max_tokens": "low=0"}, "max_tokens.low is 0, but must be at least 1"),
        ({"max_tokens": "wild=3"}, "effort is 'wild'"),
        ({"max_tokens": "low=760"}, "but the context of model 'parent' is 768"),
        ({"temperature": "-1"}, "temperature is -1"),
        ({"temperature": "nan"}, "temperature is nan"),
        ({"top_p": "0"}, "top_p is 0"),
        ({"slots": "0"}, "slots is 0"),
        ({"bootstrap": "0"}, "bootstrap is 0"),
        ({"seed": "-1"}, "seed is -1"),
        ({"rounds": "0"}, "rounds is 0"),
        ({"cache_dtype": "int3"}, "cache dtype is 'int3'"),
        ({"cache_memory": "much"}, "--cache_memory is 'much'"),
        ({"cache_memory": "10KiB"}, "one request of 12 tokens needs 19,200 bytes of cache"),
        ({"scenarios": "a"}, "--scenarios has 'a'"),
        ({"scenarios": "a=0:4"}, "input_tokens of scenario 'a' is 0"),
        ({"scenarios": "a=1:4,a=2:4"}, "--scenarios names 'a' twice"),
        ({"scenarios": "low=1:4"}, "scenario name is 'low'"),
        ({"scenarios": "a=700:69"}, "scenario 'a' needs a context of 769 tokens"),
        ({"names": ("parent",)}, "--models has 'parent'"),
        ({"names": ("parent=",)}, "--models has 'parent='"),
        ({"names": ("a=x", "a=y")}, "--models names 'a' twice"),
        ({"names": ("../a=x",)}, "model name is '../a'"),
        ({"names": ("a=nowhere",)}, "model 'a': nowhere is not a directory"),
        ({"no_such_option": "1"}, "there is no option --no-such-option"),
    ],
)
def test_bad_settings_are_one_sentence_and_write_nothing(models, tmp_path, capsys, changes, message):
    assert evaluate(models, tmp_path / "out", **changes) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["no config", "no weights", "no effort in the template"])
def test_a_damaged_model_is_refused_by_name(models, tmp_path, capsys, damage):
    copy = tmp_path / "copy"
    shutil.copytree(models / "child", copy)
    if damage == "no config":
        (copy / "config.json").unlink()
    elif damage == "no weights":
        (copy / "model.safetensors").unlink()
    else:
        template = (copy / "chat_template.jinja").read_text().replace("reasoning_effort", "mood")
        (copy / "chat_template.jinja").write_text(template)
    assert evaluate(models, tmp_path / "out", names=(f"parent={models}/parent", f"other={copy}")) == 2
    said = capsys.readouterr().err
    assert "model 'other'" in said and str(copy) in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_something_else_is_refused_and_kept(models, finished, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("a letter")
    assert evaluate(models, file) == 2
    assert "is a file, but must be a directory" in capsys.readouterr().err
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    assert evaluate(models, foreign) == 2
    assert "thesis.txt" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken)
    (broken / "settings.json").write_text("{")
    assert evaluate(models, broken) == 2
    assert "settings.json cannot be read as JSON" in capsys.readouterr().err
    spoiled = tmp_path / "spoiled"
    shutil.copytree(finished, spoiled)
    (spoiled / "throughput.jsonl").write_text("[1]\n")
    assert evaluate(models, spoiled) == 2
    assert "throughput.jsonl, line 1: the value is a list, but must be an object" in capsys.readouterr().err
    assert file.read_text() == "a letter" and os.listdir(foreign) == ["thesis.txt"]


def put(path: Path, content: str | None) -> None:
    """Replaces a file or directory by a file with `content`, or by a dangling link if it is None."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text(content) if content is not None else path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", None, "holds files that are no run's (answers"),
        ("settings.json", "[" * 100_000, "settings.json is nested too deeply"),
        ("settings.json", '{"date": "2026-01-01"}', "holds another run"),
        ("settings.json", '{"date": 3}', "settings.json is damaged: it holds no date"),
        ("answers", "", "answers: File exists"),
        ("answers", None, "answers: File exists"),
        ("answers/child.jsonl", '{"task": 1}\n', "child.jsonl, line 1"),
        ("answers/child.jsonl", "[" * 100_000 + "\n", "child.jsonl, line 1"),
        ("throughput.jsonl", "[1]\n", "throughput.jsonl, line 1: the value is a list"),
        ("throughput.jsonl", '{"key": "a", "workload": "b", "tokens_per_second": {"parent": 0}}\n', "parent is 0"),
        (
            "throughput.jsonl",
            '{"key": "a", "workload": "b", "tokens_per_second": {"parent": true}}\n',
            "is true or false",
        ),
        ("throughput.jsonl", "1" + "0" * 5000 + "\n", "throughput.jsonl, line 1 holds a whole number of thousands"),
    ],
)
def test_damaged_records_are_one_sentence(models, finished, tmp_path, capsys, name, content, message):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    put(out / name, content)
    assert evaluate(models, out) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_round_without_one_of_the_models_is_refused(models, finished, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    rows = [json.loads(line) for line in (out / "throughput.jsonl").read_text().splitlines()]
    del rows[0]["tokens_per_second"]["child"]
    put(out / "throughput.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(models, out) == 2
    assert "holds rounds of 'tiny' without all models; remove the file" in capsys.readouterr().err


def test_how_rows_are_scored_is_part_of_an_evaluation(models, tmp_path):
    rows = tmp_path / "rows.jsonl"

    def identity(**changes) -> dict:
        rows.write_text(json.dumps({"prompt": "1+1=", "answer": "2", **changes}) + "\n")
        settings = Settings(
            models={"a": models / "parent"}, out=tmp_path / "out", tasks=(str(rows),), problems=1, throughput=False
        )
        return Evaluation(settings, Console(quiet=True))._identity()

    assert identity() == identity(match="exact") != identity(match="contains")


def test_markup_in_names_is_text(models, tmp_path, capsys):
    out = tmp_path / "x[/bold]y[red]:smile:"
    assert evaluate(models, out, "--no-throughput") == 0
    assert f"Everything is in {out}" in capsys.readouterr().out


def test_fingerprints_tell_weights_apart_and_not_directories(models, tmp_path):
    from datetime import datetime

    from puzzle_jax.evaluate.models import Model

    shutil.copytree(models / "child", tmp_path / "copy")
    today = datetime(2026, 1, 1)
    parent, child, copy = (
        Model.open("m", path, today) for path in (models / "parent", models / "child", tmp_path / "copy")
    )
    assert parent.fingerprint != child.fingerprint == copy.fingerprint


def test_speeds_are_known_by_everything_that_they_depend_on(models, finished):
    keys = [json.loads(line)["key"] for line in (finished / "throughput.jsonl").read_text().splitlines()]
    assert len(set(keys)) == 3 and len(keys) == 9
    assert "cpu" in speeds.device()
