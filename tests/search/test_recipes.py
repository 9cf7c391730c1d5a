"""The recipes that come with the package: every one parses, and its target can be met."""

import pytest

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.recipe_files import recipe_names
from puzzle_jax.search.costs import compute_costs
from puzzle_jax.search.frontier import speedup
from puzzle_jax.search.problem import Problem, Scores
from puzzle_jax.search.recipe_file import parse_recipe
from puzzle_jax.search.roofline import Roofline
from puzzle_jax.search.space import ExpertChoice, Space, candidate_counts, candidate_windows

# gpt-oss-120b
LAYERS = tuple(BlockConfig(128, None if layer % 2 else 128) for layer in range(36))
CONFIG = ModelConfig(201088, 2880, 2880, 64, 8, 64, 4, LAYERS)


def test_names():
    assert recipe_names("search") == ["gpt-oss-120b-1xh100", "gpt-oss-120b-8xh100", "tiny"]
    for name in recipe_names("search"):
        assert str(parse_recipe(["--recipe", name], "test")[1].run) == f"runs/{name}"


@pytest.mark.parametrize(("name", "devices"), [("gpt-oss-120b-8xh100", 8), ("gpt-oss-120b-1xh100", 1)])
def test_published_deployments(name, devices):
    stage, recipe = parse_recipe(["solve", "--recipe", name, "--solve.gap", "0.02"], "test", ["solve"])
    assert stage == "solve" and recipe.solve.gap == 0.02
    assert [(s.devices, s.input_tokens, s.output_tokens) for s in recipe.scenarios] == [
        (devices, 65536, 65536),
        (devices, 4096, 4096),
    ]
    counts = candidate_counts(128, 4, recipe.space.fractions, recipe.space.divisor)
    assert counts == (128, 112, 96, 80, 64, 48, 32)
    choices = tuple(ExpertChoice(count, tuple(range(count)), "any") for count in counts)
    space = Space(CONFIG, (choices,) * 36, candidate_windows(CONFIG, recipe.space.windows))
    costs = compute_costs(space, recipe.scenarios, "mxfp4", Roofline(), memory=Roofline())
    # Made-up scores: each step down costs more than the one before it, and more in later layers.
    scores = Scores(
        experts=tuple(tuple((128 - c) ** 2 * (1 + layer / 36) for c in counts) for layer in range(36)),
        attention=tuple(
            tuple(500.0 * (position + layer / 36) if position else 0.0 for position in range(len(windows)))
            for layer, windows in enumerate(space.windows)
        ),
    )
    problem = Problem(space, scores, costs, recipe.target)
    [child] = problem.solve(gap=recipe.solve.gap)
    assert child.meets_target and child.score > 0
    wanted = recipe.target.min_speedup
    for scenario in costs.scenarios:
        rate = costs.tokens_per_second(child.blocks, scenario.name, child.batches[scenario.name])
        assert rate >= wanted[scenario.name] * costs.tokens_per_second(LAYERS, scenario.name) * (1 - 1e-9)
        memory = costs.memory_bytes(child.blocks, scenario.name, child.batches[scenario.name])
        assert memory <= costs.room_bytes[scenario.name]
    assert speedup(problem, child) >= min(wanted.values()) * (1 - 1e-9)
