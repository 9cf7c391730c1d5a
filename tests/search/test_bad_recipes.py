"""Over a hundred recipes that make no sense: each ends in one sentence and exit code 2, and changes nothing."""

import copy
from collections.abc import Set

import pytest
import yaml

from puzzle_jax.convert_hf.export import save_checkpoint
from puzzle_jax.search.__main__ import main
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.support import chat_config, random_params

GOOD = {
    "traces": {"tasks": ["chain"], "calibration": 3, "max_tokens": {"low": 5, "medium": 6, "high": 7}},
    "space": {"fractions": [1, 0.75, 0.5], "windows": [24]},
    "scenario": {"name": "chat", "input_tokens": 40, "output_tokens": 8, "batch": 3, "hardware": "h100"},
    "target": {"max_expert_bytes_ratio": 0.8},
    "costs": "roofline",
}

NAN, INF = float("nan"), float("inf")

# Dotted field, the value put there, and words that the message must hold for the field and for the value.
BAD_FIELDS = [
    # Of the wrong type.
    ("traces", 7, "traces", "7"),
    ("traces", ["chain"], "traces", "chain"),
    ("traces.tasks", [3], "traces.tasks", "3"),
    ("traces.efforts", {"low": 1}, "traces.efforts", "low"),
    ("traces.calibration", "many", "traces.calibration", "many"),
    ("traces.calibration", 2.5, "traces.calibration", "2.5"),
    ("traces.calibration", [3], "traces.calibration", "[3]"),
    ("traces.calibration", True, "traces.calibration", "True"),
    ("traces.heldout", None, "traces.heldout", "None"),
    ("traces.temperature", "warm", "traces.temperature", "warm"),
    ("traces.seed", "dice", "traces.seed", "dice"),
    ("traces.max_tokens", "many", "traces.max_tokens", "many"),
    ("traces.max_tokens", {"low": "few", "medium": 2, "high": 3}, "traces.max_tokens", "few"),
    ("traces.file", 3, "traces.file", "3"),
    ("space.fractions", ["half"], "space.fractions", "half"),
    ("space.divisor", 1.5, "space.divisor", "1.5"),
    ("space.windows", ["wide"], "space.windows", "wide"),
    ("space.windows", [None], "space.windows", "None"),
    ("space.restrict", "0-1", "space.restrict", "0-1"),
    ("space.restrict", [{"min_experts": 4}], "space.restrict", "layers"),
    ("space.restrict", [{"layers": "0", "min_experts": "few"}], "space.restrict", "few"),
    ("scenario", "chat", "scenario", "chat"),
    ("scenario.name", ["chat"], "scenario.name", "chat"),
    ("scenario.input_tokens", "40 or so", "scenario.input_tokens", "40 or so"),
    ("scenario.batch", 2.5, "scenario.batch", "2.5"),
    ("target", [0.8], "target", "0.8"),
    ("target.max_kl", 0.5, "target.max_kl", "0.5"),
    ("target.max_kl", {"nats": {"high": "little"}}, "max_kl.nats", "little"),
    ("target.min_speedup", "faster", "target.min_speedup", "faster"),
    ("score.method", "guess", "score.method", "guess"),
    ("solve.time_limit", "short", "solve.time_limit", "short"),
    ("mesh.data", "all", "mesh.data", "all"),
    ("costs", 3, "costs", "3"),
    ("costs", None, "costs", "None"),
    ("parent", ["a", "b"], "parent", "['a', 'b']"),
    # Not finite.
    ("traces.temperature", NAN, "traces.temperature", "nan"),
    ("traces.temperature", INF, "traces.temperature", "inf"),
    ("space.fractions", [NAN], "fraction", "nan"),
    ("space.fractions", [INF], "fraction", "inf"),
    ("solve.time_limit", NAN, "solve.time_limit", "nan"),
    ("solve.time_limit", INF, "solve.time_limit", "inf"),
    ("solve.gap", NAN, "solve.gap", "nan"),
    ("target.min_speedup", NAN, "min_speedup", "nan"),
    ("target.min_speedup", INF, "min_speedup", "inf"),
    ("target.max_expert_bytes_ratio", NAN, "max_expert_bytes_ratio", "nan"),
    ("target.max_memory_bytes", INF, "max_memory_bytes", "inf"),
    ("scenario.usable_memory", NAN, "usable_memory", "nan"),
    # Negative, zero, or too large.
    ("traces.calibration", -3, "traces.calibration", "-3"),
    ("traces.validation", 0, "traces.validation", "0"),
    ("traces.confirmation", 0, "traces.confirmation", "0"),
    ("traces.batch_size", 0, "traces.batch_size", "0"),
    ("traces.temperature", -0.5, "traces.temperature", "-0.5"),
    ("traces.seed", -1, "traces.seed", "-1"),
    ("traces.max_tokens", {"low": 0, "medium": 2, "high": 3}, "traces.max_tokens", "low"),
    ("space.fractions", [0], "fraction", "0"),
    ("space.fractions", [-0.5], "fraction", "-0.5"),
    ("space.fractions", [1, 1.5], "fraction", "1.5"),
    ("space.windows", [0], "window", "0"),
    ("space.windows", [-24], "window", "-24"),
    ("space.divisor", -2, "divisor", "-2"),
    ("scenario.name", "", "name", "''"),
    ("scenario.name", "a/b", "name", "a/b"),
    ("scenario.input_tokens", 0, "input_tokens", "0"),
    ("scenario.output_tokens", -8, "output_tokens", "-8"),
    ("scenario.kv_bytes_per_value", 3, "kv_bytes_per_value", "3"),
    ("scenario.devices", 0, "devices", "0"),
    ("scenario.usable_memory", 1.5, "usable_memory", "1.5"),
    ("scenario.hardware", "abacus", "hardware", "abacus"),
    ("target.max_kv_bytes_ratio", 0, "max_kv_bytes_ratio", "0"),
    ("target.min_speedup", 0.5, "min_speedup", "0.5"),
    ("target.max_kl", {"nats": {"high": 0}}, "max_kl.nats.high", "0"),
    ("target.max_kl", {"times_mean": {"tasks": -1}}, "max_kl.times_mean.tasks", "-1"),
    ("target.max_kl", {"share_of_entropy": {"chain/low": INF}}, "share_of_entropy.chain/low", "inf"),
    ("score.per_call", 0, "score.per_call", "0"),
    ("score.keep_sets", -1, "score.keep_sets", "-1"),
    ("solve.solutions", 0, "solve.solutions", "0"),
    ("solve.time_limit", 0, "solve.time_limit", "0"),
    ("solve.gap", -0.1, "solve.gap", "-0.1"),
    ("refine.rounds", 3, "refine.rounds", "3"),
    ("refine.swaps", -1, "refine.swaps", "-1"),
    ("refine.proposals", -2, "refine.proposals", "-2"),
    ("refine.swaps_by", "guess", "refine.swaps_by", "guess"),
    ("evaluate.problems", 0, "evaluate.problems", "0"),
    ("evaluate.seed", -1, "evaluate.seed", "-1"),
    ("mesh.model", 0, "mesh.model", "0"),
    # Empty or duplicated.
    ("traces.tasks", [], "traces.tasks", "needs traces.file"),
    ("traces.efforts", [], "traces.efforts", "empty"),
    ("space.fractions", [], "space.fractions", "empty"),
    ("target", {"max_expert_bytes_ratio": None, "min_speedup": None}, "target", "empty"),
    ("target", {"max_expert_bytes_ratio": None, "max_kl": {"nats": {"high": 0.5}}}, "apart from max_kl", "max_kl"),
    ("traces.tasks", ["chain", "chain"], "traces.tasks", "chain"),
    ("traces.efforts", ["low", "high", "low"], "traces.efforts", "low"),
    ("space.windows", [24, 24], "space.windows", "24"),
    ("space.fractions", [0.5, 1, 0.5], "space.fractions", "0.5"),
    ("evaluate.baselines", ["uniform", "uniform"], "evaluate.baselines", "uniform"),
    # Unknown.
    ("colour", "blue", "colour", "not"),
    ("traces.colour", "blue", "colour", "not"),
    ("scenario.gpus", 8, "gpus", "not"),
    ("space.restrict", [{"layers": "0", "colour": "blue"}], "space.restrict", "colour"),
    ("traces.tasks", ["poetry"], "task", "poetry"),
    ("traces.efforts", ["heroic"], "effort", "heroic"),
    ("target.max_kl", {"nats": {"heroic": 0.5}}, "target.max_kl.nats", "heroic"),
    ("target.max_kl", {"times_mean": {"add": 2}}, "target.max_kl.times_mean", "add"),
    ("target.max_kl", {"bits": {"high": 0.5}}, "target.max_kl", "bits"),
    ("evaluate.baselines", ["luck"], "evaluate.baselines", "luck"),
    # Contradictory.
    ("space.divisor", 64, "divisor", "64"),
    ("space.restrict", [{"layers": "9"}], "space.restrict", "9"),
    ("space.restrict", [{"layers": "0", "min_experts": 8, "max_experts": 4}], "space.restrict", "8"),
    ("scenario.input_tokens", 10**7, "position", "10000008"),
]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    config = chat_config()
    out = tmp_path_factory.mktemp("parent") / "checkpoint"
    save_checkpoint(out, config, random_params(config, 0), config_base={}, extra_files=chat_files())
    return out


def refusal(recipe, tmp_path, parent, capsys, left: Set[str] = frozenset({"run.json"})):
    """Returns the one sentence that refuses a recipe's first stage, which may leave no files but `left`."""
    run = tmp_path / "run"
    arguments = ["cost", "--parent", str(parent), "--recipe", str(recipe), "--run", str(run)]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said, said
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} <= left
    return said


@pytest.mark.parametrize(("field", "value", "named", "shown"), BAD_FIELDS, ids=lambda value: str(value)[:30])
def test_bad_fields(tmp_path, parent, capsys, field, value, named, shown):
    recipe = copy.deepcopy(GOOD)
    *sections, last = field.split(".")
    place = recipe
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    said = refusal(path, tmp_path, parent, capsys)
    assert named in said and shown in said, said


# Targets that no architecture reaches; costs.json, from which the refusal was worked out, stays.
BAD_TARGETS = [
    ({"max_expert_bytes_ratio": 0.1, "min_speedup": None}, "expert bytes ratio 0.1"),
    ({"max_expert_bytes_ratio": None, "min_speedup": 50}, "speed-up in scenario 'chat' 50"),
    ({"max_expert_bytes_ratio": 0.8, "min_speedup": 50}, "speed-up in scenario 'chat' 50"),
    ({"max_kv_bytes_ratio": 0.01}, "0.01"),
    ({"min_tokens_per_second": 1e12}, "1e+12"),
]


@pytest.mark.parametrize(("target", "named"), BAD_TARGETS, ids=lambda value: str(value)[:30])
def test_targets_out_of_reach(tmp_path, parent, capsys, target, named):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**GOOD, "target": target}))
    said = refusal(path, tmp_path, parent, capsys, left={"run.json", "cost/stage.json", "cost/costs.json"})
    assert "the target cannot be met" in said and named in said, said


BAD_FILES = {
    "empty": b"",
    "a comment": b"# nothing yet\n",
    "a list": b"- traces\n- space\n",
    "words": b"just make it fast\n",
    "broken YAML": b"traces: [1\n",
    "tabs": b"traces:\n\tseed: 1\n",
    "two documents": b"--- {}\n--- {}\n",
    "a tag": b"costs: !!python/object:os.system x\n",
    "a number as a field": b"1: 2\n",
    "binary": bytes(range(256)),
    "a field twice": b"traces: {seed: 1}\nspace: {}\ntraces: {seed: 2}\n",
    "a field of a section twice": b"traces:\n  seed: 1\n  seed: 2\n",
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, parent, capsys, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert str(path) in refusal(path, tmp_path, parent, capsys)


@pytest.mark.parametrize("place", ["nowhere.yaml", "."])
def test_places_without_a_file(tmp_path, parent, capsys, place):
    assert str(tmp_path / place) in refusal(tmp_path / place, tmp_path, parent, capsys)
