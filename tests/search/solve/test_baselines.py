"""The problem and its baselines against an enumeration of all architectures of small spaces with random scores."""

import itertools
import json
import random as random_numbers

import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError, InfeasibleError
from puzzle_jax.search.solve.baselines import all_baselines, greedy, max_params, random, uniform
from puzzle_jax.search.solve.frontier import frontier, speedup, uniform_frontier
from puzzle_jax.search.solve.problem import Candidate, Problem, Scores, attention_group, experts_group, window_name
from puzzle_jax.search.space import ExpertChoice, Space, candidate_windows
from tests.support import small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7), BlockConfig(7, 5)), hidden_size=64, intermediate_size=32)
CHAT = Scenario("chat", input_tokens=12, output_tokens=6, batch=3)
CHOICES = (
    ExpertChoice(7, tuple(range(7)), "all"),
    ExpertChoice(5, (0, 1, 2, 3, 4), "reap"),
    ExpertChoice(5, (2, 3, 4, 5, 6), "frequency"),
    ExpertChoice(3, (0, 1, 2), "reap"),
)
SPACE = Space(CONFIG, (CHOICES,) * 3, candidate_windows(CONFIG, (8,)))


class Provider:
    """Fewer experts save a little time, windows a lot."""

    name = "by hand"

    def device(self, scenario):
        return "paper"

    def times(self, config, scenario, form, counts, windows):
        return Times(
            experts={c: Seconds(0.01 + 0.002 * c, 0.001 + 0.0001 * c) for c in counts},
            attention={w: Seconds(0.02, 0.0005 * (w or 40)) for w in windows},
            fixed=Seconds(0.005, 0.0005),
        )


COSTS = compute_costs(SPACE.offer, [CHAT], "mxfp4", Provider())


def problem_of(target, seed=0):
    source = random_numbers.Random(seed)
    scores = Scores(
        experts=tuple(
            tuple(0.0 if c.count == 7 else source.random() * (8 - c.count) for c in CHOICES) for _ in range(3)
        ),
        attention=tuple(tuple(0.0 if i == 0 else source.random() for i in range(len(w))) for w in SPACE.windows),
    )
    return Problem(SPACE, scores, COSTS, target)


def every(problem):
    options = [[c.name for c in choices] for choices in SPACE.expert_choices]
    windows = [[window_name(w) for w in layer] for layer in SPACE.windows]
    for names in itertools.product(*options, *windows):
        choice = {"shared": ""}
        for layer in range(3):
            choice[experts_group(layer)] = names[layer]
            choice[attention_group(layer)] = names[3 + layer]
        yield problem.assess("x", choice)


BOTH = Target(max_expert_bytes_ratio=0.65, min_speedup=1.2)


@pytest.mark.parametrize("seed", range(3))
def test_solution_is_the_best_of_all_and_no_baseline_beats_it(seed):
    problem = problem_of(BOTH, seed)
    met = [c for c in every(problem) if c.meets_target]
    [best] = problem.solve(gap=0.0)
    assert best.score == pytest.approx(min(c.score for c in met))
    for candidate in (best, *met):
        assert 100 * COSTS.expert_bytes(candidate.blocks) <= 65 * COSTS.expert_bytes(CONFIG.blocks)
        assert COSTS.tokens_per_second(candidate.blocks) >= 1.2 * COSTS.tokens_per_second(CONFIG.blocks) * (1 - 1e-12)
    for name, candidate in all_baselines(problem, seed=seed).items():
        assert candidate.name == name
        if candidate.meets_target:
            assert candidate.score >= best.score - 1e-12
        else:
            assert name in ("experts_only", "windows_only")


@pytest.mark.parametrize("target", [BOTH, Target(max_expert_bytes_ratio=0.9, min_speedup=1.05)])
def test_the_best_of_every_pattern_of_reach(target):
    """Layers 0 and 2 see as little as in the parent and cannot see less here, layer 1 may."""
    problem = problem_of(target, seed=1)
    best = {}
    for candidate in sorted((c for c in every(problem) if c.meets_target), key=lambda c: c.score):
        best.setdefault(
            tuple(b.window == p.window for b, p in zip(candidate.blocks, CONFIG.blocks, strict=True)), candidate
        )
    found = problem.by_reach(9, gap=0.0)
    assert [c.score for c in found] == pytest.approx([c.score for c in best.values()])
    assert [c.name for c in found] == [f"pattern {i + 1}" for i in range(len(best))]
    assert [c.score for c in problem.by_reach(1, gap=0.0)] == pytest.approx([min(c.score for c in best.values())])
    with pytest.raises(InfeasibleError, match="speed-up"):
        problem_of(Target(min_speedup=99.0)).by_reach(2)


def test_candidate_costs_are_those_of_its_blocks():
    for candidate in itertools.islice(every(problem_of(BOTH)), 0, None, 7):
        blocks = candidate.blocks
        assert candidate.costs["expert_bytes"] == COSTS.expert_bytes(blocks)
        assert candidate.costs["parameters"] == COSTS.parameters(blocks)
        assert candidate.costs["kv_bytes.chat"] == COSTS.kv_bytes(blocks)
        assert candidate.costs["request_seconds.chat"] == pytest.approx(COSTS.request_seconds(blocks))
        assert candidate.costs["prefill_seconds.chat"] == pytest.approx(COSTS.prefill_seconds(blocks))
        assert candidate.costs["decode_seconds.chat"] == pytest.approx(COSTS.decode_seconds(blocks))
        assert [len(kept) for kept in candidate.kept] == [block.num_experts for block in blocks]


def test_parent_is_the_parent_and_meets_ratios_of_one():
    problem = problem_of(Target(max_expert_bytes_ratio=1.0, min_speedup=1.0, max_kv_bytes_ratio=1.0))
    parent = problem.parent()
    assert parent.blocks == CONFIG.blocks and parent.score == 0 and parent.meets_target
    [best] = problem.solve()
    assert best.score == 0


def test_candidate_json_and_back():
    [best] = problem_of(BOTH).solve()
    assert Candidate.from_json(json.loads(json.dumps(best.to_json()))) == best
    layer = best.to_json()["layers"][1]
    assert {"num_local_experts", "sliding_window", "method", "kept"} == set(layer)


def test_uniform_is_one_count_and_one_window():
    problem = problem_of(BOTH)
    found = uniform(problem, method="frequency")
    assert {b.num_experts for b in found.blocks} == {3} and [b.window for b in found.blocks] == [5, 8, 5]
    assert found.meets_target
    half = problem_of(Target(max_expert_bytes_ratio=5 / 7))
    assert uniform(half, method="frequency").kept == ((2, 3, 4, 5, 6),) * 3
    assert uniform(half, method="reap").kept == ((0, 1, 2, 3, 4),) * 3
    assert uniform(half).blocks[1] == BlockConfig(5)  # exactly at the limit, and no window where none is needed


def test_restricted_baselines_keep_the_rest_and_say_what_they_miss():
    baselines = all_baselines(problem_of(BOTH))
    experts, windows = baselines["experts_only"], baselines["windows_only"]
    assert [b.window for b in experts.blocks] == [5, None, 5]
    assert not experts.meets_target and experts.violated[0].startswith("speed-up in scenario 'chat' is 1.1")
    assert experts.blocks == tuple(BlockConfig(3, b.window) for b in CONFIG.blocks)  # nearest to that speed
    assert windows.blocks == (BlockConfig(7, 5), BlockConfig(7, 8), BlockConfig(7, 5))
    assert windows.violated == ("expert bytes ratio is 1, asked for 0.65",)


def test_max_params_keeps_most_whatever_it_hurts():
    problem = problem_of(BOTH)
    most = max(c.costs["parameters"] for c in every(problem) if c.meets_target)
    assert max_params(problem).costs["parameters"] == most


def test_random_is_reproducible_and_reaches_tight_targets():
    tight = problem_of(Target(max_expert_bytes_ratio=0.429, min_speedup=1.2))
    assert random(tight, seed=1).meets_target and random(tight, seed=1) == random(tight, seed=1)
    found = {random(problem_of(BOTH), seed=seed).blocks for seed in range(8)}
    assert len(found) > 2


def test_greedy_stops_where_nothing_helps():
    found = greedy(problem_of(Target(min_speedup=50.0)))
    assert not found.meets_target
    assert found.blocks == (BlockConfig(3, 5), BlockConfig(3, 8), BlockConfig(3, 5))


def test_unreachable_targets_are_explained_in_the_users_terms():
    with pytest.raises(
        InfeasibleError, match=r"cannot be met: speed-up in scenario 'chat' 50; the best reachable"
    ) as e:
        problem_of(Target(min_speedup=50.0)).solve()
    reachable = float(str(e.value).split()[-1])
    assert problem_of(Target(min_speedup=reachable)).solve()[0].meets_target
    with pytest.raises(InfeasibleError):
        problem_of(Target(min_speedup=reachable + 0.002)).solve()
    with pytest.raises(InfeasibleError, match=r"expert bytes ratio 0\.1; the best reachable by itself is .* 0\.429"):
        problem_of(Target(max_expert_bytes_ratio=0.1)).solve()
    with pytest.raises(InfeasibleError, match=r"KV bytes ratio in scenario 'chat' 0\.01"):
        problem_of(Target(max_kv_bytes_ratio=0.01)).solve()


def test_pool_has_distinct_architectures_in_order():
    pool = problem_of(BOTH).solve(num_solutions=6, gap=0.0)
    assert [c.name for c in pool] == [f"solution {i}" for i in range(1, 7)]
    assert [c.score for c in pool] == sorted(c.score for c in pool)
    assert len({(c.kept, c.blocks) for c in pool}) == 6
    best = sorted(c.score for c in every(problem_of(BOTH)) if c.meets_target)[:6]
    assert [c.score for c in pool] == pytest.approx(best)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (Scores(((0.0,),) * 3, ((0.0,),) * 3), "scores.experts has .1, 1, 1. numbers per layer"),
        (Scores(((0.0,) * 4,) * 3, ((0.0,),) * 3), "scores.attention has"),
        (Scores(((0.0, float("nan"), 1.0, 1.0),) * 3, ((0.0,), (0.0, 1.0), (0.0,))), "layer 0 are .0.0, nan"),
    ],
)
def test_scores_must_fit_the_space(scores, words):
    with pytest.raises(ConfigError, match=words):
        Problem(SPACE, scores, COSTS, BOTH)


def test_the_frontier_is_the_best_of_all_architectures_at_every_speed():
    problem = problem_of(Target(max_expert_bytes_ratio=0.9), seed=3)
    found = frontier(problem)
    everything = [(speedup(problem, c), c.score) for c in every(problem) if not c.violated]
    fastest = max(speed for speed, _ in everything)
    assert [point.label for point in found] == [f"{1 + 0.1 * n:g}x asked for" for n in range(len(found))]
    assert 1 + 0.1 * (len(found) - 1) <= fastest < 1 + 0.1 * len(found) + 1e-9
    for number, point in enumerate(found):
        least = min(score for speed, score in everything if speed >= 1 + 0.1 * number - 1e-9)
        assert point.score == pytest.approx(least) and point.speedup >= 1 + 0.1 * number - 1e-9


def test_every_uniform_architecture_is_on_its_curve():
    problem = problem_of(Target(min_speedup=1.2))
    points = uniform_frontier(problem)
    assert len(points) == 3 * 2  # counts of 7, 5 and 3; the full layer's window full or 8
    whole = next(point for point in points if point.label == "7 experts, window full")
    assert (whole.speedup, whole.score) == (1.0, 0.0)
