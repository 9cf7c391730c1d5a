"""Settings derived from the parent, tasks and deployment: given ones take precedence, and missing ones are named."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from puzzle_jax.errors import ConfigError
from puzzle_jax.run import command
from puzzle_jax.run.__main__ import VERBS, main
from puzzle_jax.run.resolved import resolved
from puzzle_jax.settings.verbs import parse
from tests.run.toy_road import SETTINGS, arguments, parent_and_prompts, settings

SCENARIO = SETTINGS["search.scenario"]
UNSAID = dict.fromkeys(["distill__data", "accuracy__update", "length__update"])
"""Settings to leave out, since they would leave nothing to derive."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return parent_and_prompts(tmp_path_factory.mktemp("toy"))


def bare(root: Path, *more: str):
    """A run with as few settings given as possible."""
    given = ["--parent", f"{root}/parent", "--tasks", f"{root}/say.jsonl", f"--search.scenario={SCENARIO}"]
    return parse(VERBS[""], [*given, "--run", f"{root}/run", *more])


def test_stages_find_what_the_ones_before_have_made(root):
    found = settings(root, root / "run")
    run, parent = root / "run", root / "parent"
    assert (found.search.parent, found.search.run) == (parent, run / "search")
    assert (found.traces.parent, found.traces.out) == (parent, run / "traces/answers.parquet")
    distill = found.distill
    assert (distill.parent, distill.child, distill.out) == (parent, run / "search/child", run / "distill")
    assert distill.traces == found.traces.out
    assert found.accuracy.model == found.length.model == run / "distill/child"
    average = found.average
    assert (average.a, average.b) == (run / "accuracy/child", run / "length/child")
    assert (average.out, average.reference) == (run / "average/child", parent)
    assert list(found.evaluate.models) == [
        "parent",
        "control",
        "cut",
        "distilled",
        "accuracy",
        "length",
        "average",
        "final",
    ]
    assert found.evaluate.models["final"] == found.evaluate.models["average"] == run / "average/child"
    assert found.evaluate.cache_dtypes == {"final": "float8_e4m3fn"}
    assert found.control_recipe.model == parent and found.control_recipe.out == run / "control"
    assert dataclasses.replace(found.control_recipe, model=found.accuracy.model, out=found.accuracy.out) == (
        found.accuracy
    )


def test_what_is_said_once_holds_in_every_section(root):
    found = bare(root, "--efforts=low,high", "--max_tokens=low=11,high=13", "--seed=3", "--weights=dense")
    tasks = (f"{root}/say.jsonl",)
    assert found.search.traces.tasks == found.traces.tasks == found.average.tasks == found.evaluate.tasks == tasks
    assert found.accuracy.prompts.tasks == found.length.prompts.tasks == dict.fromkeys(tasks, 1.0)
    assert found.search.traces.efforts == found.evaluate.efforts == ("low", "high")
    assert found.accuracy.prompts.efforts == {"low": 1.0, "high": 1.0}
    assert found.search.traces.max_tokens == {"low": 11, "high": 13}
    assert found.accuracy.rollout.limit("high") == found.evaluate.max_tokens["high"] == 13
    assert found.distill.seed == found.accuracy.seed == found.accuracy.prompts.seed == found.evaluate.seed == 3
    assert found.search.weights == found.distill.weights == "dense"


def test_a_section_of_its_own_comes_first(root):
    found = bare(root, "--max_tokens=9", "--accuracy.rollout.max_tokens=7", "--traces.seed=5", "--seed=3")
    assert found.accuracy.rollout.limit("low") == 7 and found.length.rollout.limit("low") == 9
    assert (found.traces.seed, found.evaluate.seed) == (5, 3)


def test_numbers_by_effort_are_there_for_every_effort(root):
    found = bare(root, "--efforts=low,high", "--traces.problems=low=31,high=17")
    assert found.traces.problems == {"low": 31, "high": 17} and found.distill.data.heldout == (31 + 17) // 8
    assert bare(root, "--max_tokens.low=3", "--max_tokens.medium=5", "--max_tokens.high=7").max_tokens["high"] == 7
    for name in ("traces.problems", "max_tokens"):
        with pytest.raises(ConfigError, match=rf"{name} is {{'low': 3}}, which has no .* for effort 'medium'"):
            bare(root, f"--{name}=low=3")
        with pytest.raises(ConfigError, match=rf"{name} is 'few', which has no whole number for effort 'low'"):
            bare(root, f"--{name}=few")


def test_sizes_follow_from_prompts_limits_and_memory(root, monkeypatch):
    monkeypatch.setattr("puzzle_jax.model.weights.device_memory", lambda: 10**8)
    found = bare(root)
    # 8 output tokens in the deployment, lower efforts get fewer; 40 rows, of which a sixth is for training.
    assert found.max_tokens == {"low": 1, "medium": 2, "high": 8}
    assert found.traces.problems == {"low": 6, "medium": 6, "high": 6}
    assert found.evaluate.problems == 6 and found.evaluate.rows == "unseen"
    assert found.distill.data.row_length == found.accuracy.update.row_length == found.length.update.row_length == 128
    assert 1 <= found.traces.batch_size <= 256 and found.traces.batch_size == found.accuracy.rollout.slots
    assert found.evaluate.slots == found.traces.batch_size and 0.39 * 10**8 < found.evaluate.cache_memory <= 0.4 * 10**8
    assert found.distill.loop.steps == 20 and found.distill.optimizer.warmup_steps == 2
    assert found.search.target.max_expert_bytes_ratio == 0.75
    assert found.search.costs == "roofline"
    assert found.derived["search.target.max_expert_bytes_ratio"] == "0.75: no target was given"
    assert "prompts of up to" in found.derived["distill.data.row_length"]


def test_a_deployment_has_a_name_or_a_file(root, tmp_path):
    named = parse(
        VERBS[""],
        ["--parent", f"{root}/parent", "--tasks", f"{root}/say.jsonl", "--scenario", "h100x8-4k", "--max_tokens=9"],
    )
    scenario = named.search.scenario
    assert (scenario.name, scenario.input_tokens, scenario.devices, scenario.hardware) == ("h100x8-4k", 4096, 8, "h100")
    assert named.run == Path("runs/parent")
    file = tmp_path / "mine.yaml"
    file.write_text("input_tokens: 48\noutput_tokens: 16\nbatch: 2\nhardware: a100\n")
    filed = parse(VERBS[""], ["--parent", f"{root}/parent", "--tasks", f"{root}/say.jsonl", "--scenario", f"{file}"])
    assert (filed.search.scenario.name, filed.search.scenario.batch) == ("mine", 2)
    assert filed.max_tokens == {"low": 1, "medium": 4, "high": 16}


def test_a_dry_run_takes_the_deployments_devices(root):
    found = parse(
        VERBS[""],
        [
            *("--parent", f"{root}/parent", "--tasks", f"{root}/say.jsonl"),
            *("--scenario", "h100x8-4k", "--max_tokens=9", "--dry_run"),
        ],
    )
    assert found.mesh.model == found.search.mesh.model == found.distill.mesh.model == 8
    # Evaluation uses one of the devices, the other stages all of them.
    assert 0.39 * 80e9 < found.evaluate.cache_memory < 0.4 * 90e9


def test_the_embedded_parent_has_a_recipe(root):
    found = parse(VERBS[""], ["--run", f"{root}/tiny"])
    assert found.tasks == ("chain", "add", "recall") and found.search.scenario.name == "chat"
    assert found.accuracy.prompts.tasks == {"chain": 2.0, "add": 1.0, "recall": 1.0}
    assert found.length.loss.length_budgets == {"low": 6, "medium": 20, "high": 32}
    assert found.search.run == root / "tiny/search"
    other = parse(VERBS[""], ["--run", f"{root}/tiny", "--tasks", "add"])
    assert other.accuracy.prompts.tasks == {"add": 1.0} and other.search.traces.tasks == ("add",)


def test_resolved_settings_can_be_given_back(root, tmp_path):
    found = settings(root, root / "run")
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(resolved(found)))
    again = parse(VERBS[""], ["--recipe", str(file)])
    assert resolved(again) == resolved(found)


def test_a_file_with_too_few_rows_is_refused_before_any_work(root, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "say 1", "answer": "7"}\n{"prompt": "say 2", "answer": "7"}\n')
    assert main(arguments(root, tmp_path / "run", tasks=few)) == 2
    assert f"gets none of the 2 problems of {few}, which are divided among six splits" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": None}, "needs tasks (what it shall be good at"),
        ({"search__scenario": None}, "needs scenario (the deployment, such as h100x8-64k, or a YAML file)"),
        ({"search__scenario": None, "scenario": "h100"}, "scenario is 'h100', but must be a YAML file or a name"),
        ({"distill__child": "/elsewhere"}, "distill.child is '/elsewhere', but a run gives its stages their places"),
        ({"recipes": "search=nosuch"}, "recipe is 'nosuch', but there is no such file"),
        ({"recipes": "refine=tiny"}, "recipes names 'refine', but must be of search, traces"),
        ({"stage": "distil"}, "stage is 'distil', but must be one of all, search"),
        ({"control": "false", "stage": "control"}, "stage is 'control', but must be one of all"),
        ({"distill__optimizer__warmup_steps": 9}, "distill: optimizer.warmup_steps is 9, but must be at most the 3"),
        ({"average__weights": "0.5,2", "average__weight": 1}, "average: one of weight and weights must be given, but"),
        ({"accuracy__mesh": "processes=2,data=2"}, "accuracy.mesh.processes is 2, but mesh.processes 1"),
        ({"price_per_gpu_hour": -1}, "price_per_gpu_hour is -1"),
        (
            {"max_tokens": "low=5,high=9", **UNSAID},
            "which has no whole number for effort 'medium'; give each of efforts one, or a number for all",
        ),
        ({"efforts": "most"}, "effort is 'most', but must be one of low, medium, high"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(root, changes, message, capsys):
    assert main(arguments(root, root / "refused", **changes)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1, error
    assert not (root / "refused").exists()


def test_a_derived_value_is_told_with_its_reason():
    assert list(command.derived_lines({"a.b": "0.75: no target: none", "c": "4: so"})) == [
        ("a.b", "0.75", "no target: none"),
        ("c", "4", "so"),
    ]
