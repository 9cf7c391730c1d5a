"""The recipes that come with the package: every one parses, and its target can be met."""

import json
import warnings
from pathlib import Path

import pytest

from puzzle_jax.convert_hf.describe import read_config
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError, PuzzleWarning
from puzzle_jax.search.__main__ import SEARCH
from puzzle_jax.search.recipe import EMBEDDED_PARENT, SpaceSettings, TraceSettings
from puzzle_jax.search.solve.frontier import speedup
from puzzle_jax.search.solve.problem import Problem, Scores
from puzzle_jax.search.space import ExpertChoice, Space, candidate_counts, candidate_windows
from puzzle_jax.settings.files import recipe_names
from puzzle_jax.settings.verbs import parse
from puzzle_jax.tasks.chat.embedded import chat_files
from tests.paths import ROOT

PUBLISHED = ROOT / "benchmarks" / "published"
LONG, MIDDLE, SHORT = 65536, 32768, 4096


def test_names():
    assert recipe_names("search") == [
        "gpt-oss-120b-1xh100",
        "gpt-oss-120b-8xh100",
        "gpt-oss-20b-1xh100",
        "gpt-oss-20b-24gb",
        "qwen3-30b-a3b-1xh100",
        "qwen3-30b-a3b-8xh100",
        "tiny",
        "tiny-qwen3",
    ]
    for name in recipe_names("search"):
        assert str(parse(SEARCH, ["--recipe", name]).run) == f"runs/{name}"


@pytest.mark.parametrize(
    ("name", "devices", "lengths"),
    [
        ("gpt-oss-120b-8xh100", 8, (LONG, SHORT)),
        ("gpt-oss-120b-1xh100", 1, (LONG, SHORT)),
        ("gpt-oss-20b-1xh100", 1, (LONG, SHORT)),
        ("gpt-oss-20b-24gb", 1, (SHORT,)),
        ("qwen3-30b-a3b-1xh100", 1, (MIDDLE, SHORT)),
        ("qwen3-30b-a3b-8xh100", 8, (MIDDLE, SHORT)),
    ],
)
def test_published_deployments(name, devices, lengths):
    recipe = parse(SEARCH, ["solve", "--recipe", name, "--solve.gap", "0.02"])
    assert recipe.stage == "solve" and recipe.solve.gap == 0.02
    assert [(s.devices, s.input_tokens, s.output_tokens) for s in recipe.scenarios] == [
        (devices, length, length) for length in lengths
    ]
    config = read_config(PUBLISHED / f"{name.rpartition('-')[0]}.json")
    experts, layers = config.blocks[0].num_experts, config.num_layers
    counts = candidate_counts(experts, config.experts_per_token, recipe.space.fractions, recipe.space.divisor)
    assert counts == tuple(experts * eighths // 8 for eighths in (8, 7, 6, 5, 4, 3, 2))
    choices = tuple(ExpertChoice(count, tuple(range(count)), "any") for count in counts)
    # Every window is shorter than the longest answers, from which its score is measured, and than the requests.
    windows = recipe.space.windows_for(config)
    assert bool(windows) == config.variant.sinks
    assert max(windows, default=0) < min(max(recipe.traces.max_tokens.values()), recipe.scenario.context_tokens)
    space = Space(config, (choices,) * layers, candidate_windows(config, windows))
    form = "mxfp4" if config.variant.sinks else "bf16"
    costs = compute_costs(space.offer, recipe.scenarios, form, Roofline(), memory=Roofline())
    # Made-up scores: each step down costs more than the one before it, and more in later layers.
    scores = Scores(
        experts=tuple(tuple((experts - c) ** 2 * (1 + layer / 36) for c in counts) for layer in range(layers)),
        attention=tuple(
            tuple(500.0 * (position + layer / 36) if position else 0.0 for position in range(len(windows)))
            for layer, windows in enumerate(space.windows)
        ),
    )
    problem = Problem(space, scores, costs, recipe.target)
    [child] = problem.solve(gap=recipe.solve.gap)
    assert child.meets_target and child.score > 0
    wanted = {scenario.name: recipe.target.limit("min_speedup", scenario.name) for scenario in recipe.scenarios}
    for scenario in costs.scenarios:
        rate = costs.tokens_per_second(child.blocks, scenario.name, child.batches[scenario.name])
        assert rate >= wanted[scenario.name] * costs.tokens_per_second(config.blocks, scenario.name) * (1 - 1e-9)
        memory = costs.memory_bytes(child.blocks, scenario.name, child.batches[scenario.name])
        assert memory <= costs.room_bytes[scenario.name]
    assert speedup(problem, child) >= min(wanted.values()) * (1 - 1e-9)


# A parent of the user's own ---------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A checkpoint directory with the chat files alone, which are all that is read here."""
    directory = tmp_path / "mine"
    directory.mkdir()
    for name, content in chat_files().items():
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def answers(tmp_path):
    """Prompts of 20 and 23 tokens, answers of 5 and 8."""
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": [7] * (20 + 3 * n), "completion": [9] * (5 + 3 * n), "effort": "low"} for n in range(2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_embedded_parent_alone_has_the_embedded_recipe(own):
    assert parse(SEARCH, []).traces.tasks == ("chain", "add", "recall")
    assert parse(SEARCH, ["--parent", str(EMBEDDED_PARENT)]) == parse(SEARCH, [])
    given = ["--parent", str(own), "--traces.tasks", "[chain]", "--traces.max_tokens", "{low: 9, medium: 9, high: 9}"]
    scenario = ["--scenario.input_tokens", "40", "--scenario.output_tokens", "8", "--target.min_speedup", "1.2"]
    recipe = parse(SEARCH, [*given, *scenario])
    # KV bytes are those of a bfloat16 cache, where the embedded recipe has float32; nothing else comes from it either.
    assert recipe.scenario == Scenario("serving", 40, 8) and recipe.scenario.kv_bytes_per_value == 2
    assert recipe.traces == TraceSettings(("chain",), max_tokens={"low": 9, "medium": 9, "high": 9})
    assert recipe.target == Target(min_speedup=1.2) and recipe.space == SpaceSettings()
    assert recipe.run == Path("runs/mine")


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (
            [],
            "needs traces.file .* or traces.tasks with traces.max_tokens .* and scenario.input_tokens and scenario.out",
        ),
        (["--traces.tasks", "[chain]"], "needs scenario.input_tokens and scenario.output_tokens, since"),
        (["--traces.tasks", "[chain]", "--scenario.input_tokens", "40"], "needs scenario.output_tokens, since"),
        (["--scenario.input_tokens", "40", "--scenario.output_tokens", "8"], "needs traces.file .*, since"),
        (
            ["--traces.tasks", "[chain]", "--scenario", "{input_tokens: 4, output_tokens: 5}"],
            "traces.max_tokens has no",
        ),
    ],
)
def test_what_only_the_user_can_know_is_asked_for(own, given, missing):
    with pytest.raises(ConfigError, match=missing):
        parse(SEARCH, ["--parent", str(own), *given])


def test_a_recipe_file_says_what_is_given_too(own, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"parent: {own}\ntraces: {{tasks: [chain], max_tokens: {{low: 9, medium: 9, high: 9}}}}\n")
    with pytest.raises(
        ConfigError, match=r"needs scenario.input_tokens and scenario.output_tokens, since .* gpt-oss-20b"
    ):
        parse(SEARCH, ["--recipe", str(path)])
    path.write_text("solve: {solutions: 3}\n")  # names no parent, so the embedded one is meant
    assert parse(SEARCH, ["--recipe", str(path)]).traces.tasks == ("chain", "add", "recall")


def test_answers_tell_the_scenario_and_it_is_told(own, answers):
    given = ["--parent", str(own), "--traces.file", str(answers)]
    with pytest.warns(PuzzleWarning) as told:
        recipe = parse(SEARCH, given)
    # (20 + 23) / 2 and (5 + 8) / 2, rounded up.
    assert recipe.scenario == Scenario("serving", 22, 7, 8) and recipe.target == Target(max_expert_bytes_ratio=0.75)
    said = " ".join(str(warning.message) for warning in told)
    assert "prompts of 22 and answers of 7 tokens" in said and "at most 75% of the parent's expert bytes" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = ["--scenario.input_tokens", "40", "--scenario.output_tokens", "8", "--target.min_speedup", "1.2"]
        assert parse(SEARCH, [*given, *full]).scenario == Scenario("serving", 40, 8)


def test_the_embedded_recipe_for_another_parent_is_pointed_out(own):
    with pytest.warns(PuzzleWarning, match="recipe tiny is made for the embedded parent, .* fit .*mine"):
        parse(SEARCH, ["--recipe", "tiny", "--parent", str(own)])
