"""Targets as limits: absolute ones, and sets of them by batch where a scenario leaves its batch open."""

from dataclasses import replace
from itertools import product
from math import inf

import pytest

from puzzle_jax.config import BlockConfig
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.scenario import Scenario, Target
from puzzle_jax.errors import ConfigError, InfeasibleError
from puzzle_jax.program.library import Disjunction, Limit, lookup
from puzzle_jax.search.solve.baselines import all_baselines
from puzzle_jax.search.solve.problem import Problem, Scores
from puzzle_jax.search.space import ExpertChoice, Space, candidate_windows
from tests.costs.test_table import CONFIG, PARENT_KV, Room
from tests.support import of_type, small_config

assert small_config(CONFIG.blocks, hidden_size=64, intermediate_size=32) == CONFIG
CHAT = Scenario("chat", input_tokens=12, output_tokens=6, batch=3)
OPEN = Scenario("open", input_tokens=90, output_tokens=30)
CHOICES = tuple(ExpertChoice(count, tuple(range(count)), "reap") for count in (7, 5, 3))
SPACE = Space(CONFIG, (CHOICES,) * 3, candidate_windows(CONFIG, (8,)))
SCORES = Scores(experts=((0.0, 1.0, 3.0),) * 3, attention=((0.0,), (0.0, 0.5), (0.0,)))


class Provider:
    """Prefill takes 2 s and a step 1 s; every expert adds 0.01 s to both, every four positions 0.01 s to a step."""

    name = "by hand"

    def device(self, scenario):
        return "paper"

    def times(self, config, scenario, form, counts, windows):
        scale = scenario.batch / 3
        return Times(
            experts={c: Seconds(0.01 * c * scale, 0.01 * c * scale) for c in counts},
            attention={w: Seconds(0.0, 0.0025 * (w or scenario.context_tokens) * scale) for w in windows},
            fixed=Seconds(2.0 * scale, 1.0),
        )


COSTS = compute_costs(SPACE.offer, [CHAT], "mxfp4", Provider())
# The parent in "chat" has 21 experts and windows of 5, 18 and 5.
PREFILL, DECODE = 2.0 + 0.21, 1.0 + 0.21 + 0.0025 * 28


def problem(target, costs=COSTS):
    return Problem(SPACE, SCORES, costs, target)


def test_absolute_limits_by_hand():
    target = Target(
        min_tokens_per_second=2.5,
        max_memory_bytes=1_000_000,
        max_seconds_to_first_token=2.2,
        max_seconds_per_token=1.25,
    )
    assert problem(target).limits == (
        Limit("request_seconds.chat", at_most=3 * 6 / 2.5),
        Limit("prefill_seconds.chat", at_most=2.2),
        Limit("decode_seconds.chat", at_most=1.25),
        Limit("memory_bytes.chat", at_most=1_000_000),
    )
    parent = problem(target).parent()
    assert parent.costs["prefill_seconds.chat"] == pytest.approx(PREFILL)
    assert parent.costs["request_seconds.chat"] == pytest.approx(PREFILL + 6 * DECODE)
    assert parent.costs["memory_bytes.chat"] == COSTS.weight_bytes(CONFIG.blocks) + 3 * 28 * 120
    assert parent.violated == (
        "tokens per second in scenario 'chat' is 1.82002, asked for 2.5",
        "seconds to the first token in scenario 'chat' is 2.21, asked for 2.2",
        "seconds per token in scenario 'chat' is 1.28, asked for 1.25",
    )


def test_an_absolute_limit_decides_the_child():
    # Seconds to the first token: 2.0 + 0.01 per expert; two experts fewer cost a score of 1, four fewer 3.
    [child] = problem(Target(max_seconds_to_first_token=2.17)).solve()
    assert child.score == 2.0 and sum(block.num_experts for block in child.blocks) == 17
    with pytest.raises(InfeasibleError, match=r"seconds to the first token in scenario 'chat' 2.05; .* is .* 2.09"):
        problem(Target(max_seconds_to_first_token=2.05)).solve()
    rate = 18 / (2.0 + 0.09 + 6 * (1.0 + 0.09 + 0.0025 * 18))
    with pytest.raises(InfeasibleError, match=f"tokens per second in scenario 'chat' {rate:.5f}"):
        problem(Target(min_tokens_per_second=9)).solve()


def test_open_batches_give_one_set_of_limits_each():
    costs = compute_costs(SPACE.offer, [OPEN, CHAT], "mxfp4", Provider(), memory=Room())
    target = Target(min_speedup=1.25, max_seconds_per_token=4.0, max_kv_bytes_ratio=0.5)
    found = problem(target, costs)
    *limits, batches = found.limits
    assert [of_type(Limit, limit).key for limit in limits] == [
        "kv_bytes.open",
        "kv_bytes.chat",
        "request_seconds.chat",
        "decode_seconds.chat",
    ]
    assert isinstance(batches, Disjunction)
    assert batches.name == "open" and [*batches.sets] == [str(b) for b in costs.offered_batches("open")]
    assert list(found.constraints_by_batch) == ["open"]
    by_batch = found.constraints_by_batch["open"]
    assert tuple(by_batch) == costs.offered_batches("open")
    # The parent has room for 4 requests, and the more there are, the faster it is.
    seconds = (4 / 3) * 2.21 + 30 * (1.0 + (4 / 3) * (0.21 + 0.0025 * 130))
    rate = 4 * 30 / seconds
    memory, request, decode = (constraint.limit for constraint in by_batch[12])
    assert memory == Limit("memory_bytes.open.12", at_most=Room().room_bytes(OPEN))
    assert request.key == "request_seconds.open.12"
    assert request.at_most == pytest.approx(12 * 30 / (1.25 * rate))
    assert decode == Limit("decode_seconds.open.12", at_most=4.0)
    assert by_batch[12][1].reached(12 * 30 / (1.5 * rate)) in ("1.5", "1.499")


def test_the_library_holds_every_batch():
    costs = compute_costs(SPACE.offer, [OPEN], "mxfp4", Provider(), memory=Room())
    library = problem(Target(min_speedup=1.1), costs).library
    for batch in costs.offered_batches("open"):
        key = f"request_seconds.open.{batch}"
        of_experts = lookup(library["layer 0 experts"]["5 reap"], key)
        assert of_experts == pytest.approx(31 * 0.05 * batch / 3)
        key = f"memory_bytes.open.{batch}"
        assert lookup(library["layer 1 attention"]["full"], key) == batch * 120 * 120
        assert lookup(library["layer 1 attention"]["8"], key) == batch * 8 * 120
        total = sum(lookup(next(iter(group.values())), key) for group in library.values())
        assert total == costs.memory_bytes(CONFIG.blocks, "open", batch)
    assert PARENT_KV == 130 * 120


def everything(found):
    """Every architecture of the space with the batches at which it meets the target, by hand and in plain floats."""
    costs, target = found.costs, found.target
    parent = costs.tokens_per_second(CONFIG.blocks, "open")
    for counts in product((7, 5, 3), repeat=3):
        for window in (None, 8):
            blocks = tuple(BlockConfig(c, w) for c, w in zip(counts, (5, window, 5), strict=True))
            score = sum({7: 0.0, 5: 1.0, 3: 3.0}[c] for c in counts) + (0.5 if window else 0.0)
            batches = [
                batch
                for batch in costs.offered_batches("open")
                if costs.memory_bytes(blocks, "open", batch) <= costs.room_bytes["open"]
                and costs.tokens_per_second(blocks, "open", batch) >= target.min_speedup * parent
                and costs.decode_seconds(blocks, "open", batch) <= (target.max_seconds_per_token or inf)
            ]
            yield score, blocks, batches


@pytest.mark.parametrize(("speedup", "latency"), [(1.0, None), (1.1, 2.4), (1.3, None), (1.3, 1.9), (1.6, 1.9)])
def test_the_program_chooses_the_batch(speedup, latency):
    costs = compute_costs(SPACE.offer, [OPEN], "mxfp4", Provider(), memory=Room())
    found = problem(Target(min_speedup=speedup, max_seconds_per_token=latency), costs)
    feasible = [(score, blocks, batches) for score, blocks, batches in everything(found) if batches]
    if not feasible:
        with pytest.raises(InfeasibleError, match=f"speed-up in scenario 'open' {speedup:g}"):
            found.solve()
        return
    [child] = found.solve(gap=0.0)
    assert child.score == min(score for score, _, _ in feasible)
    [batches] = [batches for _, blocks, batches in feasible if blocks == child.blocks]
    assert child.batches == {"open": max(batches, key=lambda b: costs.tokens_per_second(child.blocks, "open", b))}
    for name, baseline in all_baselines(found).items():
        meets = any(blocks == baseline.blocks for _, blocks, _ in feasible)
        assert baseline.meets_target == meets, name


def test_what_no_batch_reaches_is_told_once():
    costs = compute_costs(SPACE.offer, [OPEN], "mxfp4", Provider(), memory=Room())
    with pytest.raises(InfeasibleError) as caught:
        problem(Target(min_speedup=9), costs).solve()
    assert str(caught.value).count("speed-up in scenario 'open'") == 2
    best = max(
        costs.tokens_per_second((BlockConfig(3, 5), BlockConfig(3, 8), BlockConfig(3, 5)), "open", batch)
        for batch in costs.offered_batches("open")
    )
    reached = float(str(caught.value).rsplit(" ", 1)[1])
    assert reached == pytest.approx(best / costs.tokens_per_second(CONFIG.blocks, "open"), abs=2e-3)


def test_limits_by_scenario():
    other = Scenario("brief", input_tokens=6, output_tokens=11, batch=2)
    costs = compute_costs(SPACE.offer, [CHAT, other], "mxfp4", Provider())
    found = problem(Target(min_speedup={"brief": 1.05}, max_seconds_per_token={"chat": 1.2}), costs)
    assert [of_type(Limit, limit).key for limit in found.limits] == ["decode_seconds.chat", "request_seconds.brief"]
    with pytest.raises(ConfigError, match=r"target.min_speedup.long is 2, but the scenarios are chat, brief"):
        problem(Target(min_speedup={"long": 2}), costs)
    with pytest.raises(ConfigError, match=r"min_speedup.brief is 0.5, but must be at least 1"):
        Target(min_speedup={"brief": 0.5})


def test_several_open_scenarios_hold_together():
    other = replace(OPEN, name="wide", input_tokens=20, output_tokens=60)
    costs = compute_costs(SPACE.offer, [OPEN, other], "mxfp4", Provider(), memory=Room())
    found = problem(Target(min_speedup=1.2), costs)
    [child] = found.solve(gap=0.0)
    assert set(child.batches) == {"open", "wide"} and child.meets_target
    parent = CONFIG.blocks
    for name, batch in child.batches.items():
        assert costs.tokens_per_second(child.blocks, name, batch) >= 1.2 * costs.tokens_per_second(parent, name)
        assert costs.memory_bytes(child.blocks, name, batch) <= costs.room_bytes[name]
    with pytest.raises(InfeasibleError, match="speed-up in scenario 'wide' 7"):
        problem(Target(min_speedup={"wide": 7}), costs).solve()


@pytest.mark.parametrize("field", ["min_tokens_per_second", "max_memory_bytes", "max_seconds_per_token"])
def test_absolute_targets_are_above_zero(field):
    with pytest.raises(ConfigError, match=f"{field} is 0, but must be above 0"):
        Target(**{field: 0})  # pyright: ignore[reportArgumentType]
