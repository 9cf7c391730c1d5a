"""The roofline against numbers worked out by hand: one rate limiting at a time, then every overhead."""

from dataclasses import replace
from math import comb

import numpy as np
import pytest

from puzzle_jax.config import QWEN3_MOE, BlockConfig
from puzzle_jax.costs.assumptions import (
    DEFAULT,
    Assumptions,
    Efficiencies,
    Efficiency,
    Operations,
    default_assumptions,
    read_assumptions,
)
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.hardware import HARDWARE, Hardware, hardware_named
from puzzle_jax.costs.roofline import Roofline, cache_reads, visible_keys
from puzzle_jax.costs.routing import active_experts, probabilities, routing_profile, tiled_rows
from puzzle_jax.costs.scenario import Scenario, candidate_batches
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.search.space import ExpertChoice, Space, candidate_windows
from tests.support import small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7), BlockConfig(7, 5)), hidden_size=64, intermediate_size=32)
CHAT = Scenario("chat", input_tokens=12, output_tokens=6, batch=3)

FULL = Efficiency(1.0, 1.0)
IDEAL = Assumptions(
    usable_memory=1.0,
    reserve_bytes=0,
    max_batch=1000,
    prefill_tokens=1_000_000,
    tile_rows=1,
    efficiency=Efficiencies(FULL, FULL, FULL, FULL),
    link_efficiency=1.0,
    operations=Operations(0, 0, 0),
    step_seconds=0,
    sampling_passes=0,
)
EXPERT = (64 * 64 + 32 * 64) * 17 // 32 + 2 * 128  # bytes: 4.25 bits a weight, 128 biases of 16
ATTENTION = 64 * (60 + 30 + 30 + 60)  # weights
SLOT = 2 * 30 * 2  # bytes of a bfloat16 key and value


def device(name="paper", memory=1e30, rate=1e30, **changes):
    return replace(Hardware(name, 1e12, memory, rate, rate, 1e30, 0, 0), **changes)


# Routing ------------------------------------------------------------------------------------------------------------


def test_even_routing():
    assert probabilities(8, 2).tolist() == [0.25] * 8
    assert active_experts(probabilities(8, 2), 1) == pytest.approx(2)
    assert active_experts(probabilities(8, 2), 2) == pytest.approx(8 * (1 - 0.75**2))
    assert active_experts(probabilities(4, 4), 1) == 4
    assert active_experts(probabilities(128, 4), 10_000) == pytest.approx(128)


def test_uneven_routing_by_hand():
    assert probabilities(3, 1, (3, 2, 1)) == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert probabilities(2, 1, (3, 2, 1)) == pytest.approx([3 / 5, 2 / 5])
    assert probabilities(3, 2, (8, 1, 1)) == pytest.approx([1, 1 / 2, 1 / 2])  # no probability is above 1
    assert active_experts(np.array([0.5, 0.25]), 2) == pytest.approx(1 - 0.5**2 + 1 - 0.75**2)
    assert routing_profile(np.array([[1, 3], [6, 2]])) == pytest.approx((0.75, 0.25))
    with pytest.raises(ConfigError, match="profile has 2 loads, but a mixture has 3 experts"):
        probabilities(3, 1, (2, 1))
    with pytest.raises(ConfigError, match="above 0 and descend"):
        probabilities(2, 1, (1, 2))


def test_rows_are_rounded_up_to_tiles():
    assert tiled_rows(np.array([0.5]), 2, 2) == pytest.approx(0.75 * 2)  # 0, 1, 2 rows with 1/4, 1/2, 1/4
    assert tiled_rows(np.array([1.0, 1.0]), 5, 4) == 2 * 8
    assert tiled_rows(probabilities(7, 2), 11, 1) == pytest.approx(22)
    mean = sum(comb(9, r) * 0.3**r * 0.7 ** (9 - r) * -(-r // 4) * 4 for r in range(10))
    assert tiled_rows(np.full(3, 0.3), 9, 4) == pytest.approx(3 * mean)
    # Many tokens: every expert wastes about half a tile, and the sums do not overflow.
    assert tiled_rows(probabilities(128, 4), 8192, 64) == pytest.approx(4 * 8192 + 128 * 31.5, rel=1e-2)


# Seconds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5, 16, 40])
def test_visible_keys(window):
    for first, count in ((0, 1), (0, 30), (12, 6), (4, 3)):
        expected = sum(min(p + 1, window or p + 1) for p in range(first, first + count))
        assert visible_keys(first, count, window) == expected


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("chunk", [4, 7, 100])
def test_a_chunk_reads_what_its_queries_see(window, chunk):
    expected = 0
    for start in range(0, 23, chunk):
        queries = range(start, min(start + chunk, 23))
        expected += len({key for q in queries for key in range(max(0, q + 1 - (window or 23)), q + 1)})
    assert cache_reads(23, chunk, window) == expected


def both(hardware, scenario=CHAT, assumptions=IDEAL, counts=(5,)):
    return Roofline(hardware, assumptions).times(CONFIG, scenario, "mxfp4", list(counts), [None, 5])


def test_bytes_and_operations_by_hand():
    """Either bytes or operations are the limit, at 1000 a second; nothing else counts."""
    batch, inputs, outputs = 3, 12, 6
    slow_memory, slow_rate = device(memory=1e3), device(rate=1e3)
    touched = 5 * (1 - 0.6**batch)
    moe = both(slow_memory).experts[5]
    assert moe.decode_seconds == pytest.approx((2 * 64 * 5 + touched * EXPERT) / 1e3)
    assert moe.prefill_seconds == pytest.approx((2 * 64 * 5 + 5 * EXPERT) / 1e3, rel=1e-6)
    per_token = 2 * (64 * 5 + 2 * 3 * 64 * 32)
    moe = both(slow_rate).experts[5]
    assert moe.decode_seconds == pytest.approx(batch * per_token / 1e3)
    assert moe.prefill_seconds == pytest.approx(batch * inputs * per_token / 1e3)

    full, windowed = both(slow_memory).attention[None], both(slow_memory).attention[5]
    mean_keys = sum(range(13, 19)) / outputs
    assert full.decode_seconds == pytest.approx((2 * ATTENTION + batch * mean_keys * SLOT) / 1e3)
    assert windowed.decode_seconds == pytest.approx((2 * ATTENTION + batch * 5 * SLOT) / 1e3)
    assert full.prefill_seconds == pytest.approx((2 * ATTENTION + batch * inputs * SLOT) / 1e3)
    windowed = both(slow_rate).attention[5]
    keys = 1 + 2 + 3 + 4 + 5 * 8
    assert windowed.prefill_seconds == pytest.approx(2 * batch * (inputs * ATTENTION + 2 * 60 * keys) / 1e3)
    assert windowed.decode_seconds == pytest.approx(2 * batch * (ATTENTION + 2 * 60 * 5) / 1e3)

    fixed = both(slow_memory).fixed
    assert fixed.decode_seconds == pytest.approx(2 * 64 * (97 + batch) / 1e3)
    assert fixed.prefill_seconds == pytest.approx(2 * 64 * (97 + batch * inputs) / 1e3)
    assert both(slow_rate).fixed.decode_seconds == pytest.approx(2 * batch * 64 * 97 / 1e3)


def test_an_fp8_cache_has_half_the_bytes_and_the_fp8_rate():
    fp8 = replace(CHAT, kv_bytes_per_value=1)
    half = both(device(memory=1e3), fp8).attention[5].decode_seconds
    assert half == pytest.approx((2 * ATTENTION + 3 * 5 * SLOT / 2) / 1e3)
    faster = both(device(rate=1e3, fp8_flops_per_second=4e3), fp8).attention[5].decode_seconds
    assert faster == pytest.approx(2 * 3 * (ATTENTION + 2 * 60 * 5 / 4) / 1e3)


def test_an_fp8_checkpoint_has_its_bytes_and_the_fp8_rate():
    config = small_config((BlockConfig(7),), hidden_size=64, intermediate_size=32, swiglu_limit=None, variant=QWEN3_MOE)
    expert = 3 * (64 * 32 + 2)  # a byte a weight, and a scale of two bytes for each of three matrices

    def times(found):
        return Roofline(found, IDEAL).times(config, CHAT, "fp8", [5], [None])

    slow_memory = times(device(memory=1e3))
    touched = 5 * (1 - 0.6**3)
    assert slow_memory.experts[5].decode_seconds == pytest.approx((2 * 64 * 5 + touched * expert) / 1e3)
    mean_keys = sum(range(13, 19)) / 6
    assert slow_memory.attention[None].decode_seconds == pytest.approx((ATTENTION + 3 * mean_keys * SLOT) / 1e3)
    slow_rate = times(device(rate=1e3, fp8_flops_per_second=4e3))
    assert slow_rate.experts[5].decode_seconds == pytest.approx(2 * 3 * (64 * 5 + 2 * 3 * 64 * 32 / 4) / 1e3)
    assert slow_rate.attention[None].decode_seconds == pytest.approx(2 * 3 * (ATTENTION / 4 + 2 * 60 * mean_keys) / 1e3)
    assert slow_rate.fixed.decode_seconds == pytest.approx(2 * 3 * 64 * 97 / 1e3)  # the head stays in bfloat16


def test_every_kind_reaches_its_own_share_of_the_peaks():
    shares = Efficiencies(Efficiency(0.5, 0.1), Efficiency(0.25, 0.1), Efficiency(0.2, 0.1), Efficiency(0.8, 0.1))
    found = both(device(memory=1e3), assumptions=replace(IDEAL, efficiency=shares, sampling_passes=3))
    assert found.attention[5].decode_seconds == pytest.approx((2 * ATTENTION / 0.2 + 3 * 5 * SLOT / 0.5) / 1e3)
    touched = 5 * (1 - 0.6**3)
    assert found.experts[5].decode_seconds == pytest.approx((640 / 0.2 + touched * EXPERT / 0.25) / 1e3)
    head, sampling = 2 * 64 * (97 + 3), 3 * 4 * 3 * 97
    assert found.fixed.decode_seconds == pytest.approx((head + sampling) / 0.8 / 1e3)


def test_prefill_goes_in_steps_and_tiles_are_filled_up():
    assumed = replace(IDEAL, prefill_tokens=10, operations=Operations(2, 3, 5), step_seconds=0.5, tile_rows=4)
    found = both(device(memory=1e3, launch_seconds=0.25), assumptions=assumed)
    # 36 prompt tokens in 4 steps of 9; chunks of 10 and 2 tokens read 10 + 12 slots of their cache.
    assert found.attention[None].prefill_seconds == pytest.approx((4 * 2 * ATTENTION + 3 * 22 * SLOT) / 1e3 + 4 * 0.5)
    touched = 5 * (1 - 0.6**9)
    assert found.experts[5].prefill_seconds == pytest.approx(4 * ((640 + touched * EXPERT) / 1e3 + 0.75), rel=1e-6)
    assert found.fixed.prefill_seconds == pytest.approx(4 * (2 * 64 * (97 + 9) / 1e3 + 5 * 0.25 + 0.5))
    assert found.fixed.decode_seconds == pytest.approx(2 * 64 * (97 + 3) / 1e3 + 5 * 0.25 + 0.5)
    # Three tokens with probability 0.4 each: an expert has rows with probability 1 - 0.6^3, which fill one tile of 4.
    found = both(device(rate=1e3), assumptions=assumed).experts[5]
    rows = 5 * 4 * (1 - 0.6**3)
    assert found.decode_seconds == pytest.approx((2 * 3 * 64 * 5 + rows * 2 * 3 * 64 * 32) / 1e3)


def test_tensor_parallelism_by_hand():
    scenario = replace(CHAT, devices=3)
    assumed = replace(IDEAL, link_efficiency=0.5)
    hardware = device(memory=1e3, link_bytes_per_second=1e3, link_latency_seconds=0.25)
    found = both(hardware, scenario, assumed)
    all_reduce = 0.25 + 2 * (2 / 3) * (3 * 2 * 64) / 500
    assert found.attention[5].decode_seconds == pytest.approx((2 * ATTENTION + 3 * 5 * SLOT) / 3e3 + all_reduce)
    touched = 5 * (1 - 0.6**3)
    assert found.experts[5].decode_seconds == pytest.approx(640 / 1e3 + touched * EXPERT / 3e3 + all_reduce)
    gathered = 0.25 + (2 / 3) * (3 * 2 * 97) / 500
    assert found.fixed.decode_seconds == pytest.approx(2 * 64 * 100 / 3e3 + gathered)


def test_expert_parallelism_by_hand():
    """Two replicas of three devices, two requests each; their tokens meet on experts spread over all six."""
    scenario = replace(CHAT, batch=4, devices=6, tensor_parallel=3, expert_parallel=6)
    hardware = device(memory=1e3, link_bytes_per_second=1e3, link_latency_seconds=0.25)
    found = both(hardware, scenario, counts=(6,))
    touched = 6 * (1 - (4 / 6) ** 4)
    exchange = 2 * (0.25 + (5 / 6) * (2 / 3) * 2 * (2 * 64) / 1e3)
    assert found.experts[6].decode_seconds == pytest.approx(2 * 64 * 6 / 1e3 + touched * EXPERT / 6e3 + exchange)
    all_reduce = 0.25 + 2 * (2 / 3) * (2 * 2 * 64) / 1e3
    assert found.attention[5].decode_seconds == pytest.approx((2 * ATTENTION + 2 * 5 * SLOT) / 3e3 + all_reduce)
    with pytest.raises(ConfigError, match="expert_parallel of scenario 'chat' is 6, but must divide the 5 experts"):
        both(hardware, scenario)


def test_scenarios_that_do_not_fit_the_model():
    for changes, words in (
        ({"devices": 2}, "tensor_parallel of scenario 'chat' is 2, but must divide the model's 3 KV heads"),
        ({"output_tokens": 501}, "needs 513 positions, but the model has 512"),
        ({"batch": None}, "batch of scenario 'chat' is None"),
    ):
        with pytest.raises(ConfigError, match=words):
            both(device(), replace(CHAT, **changes))


def test_replicas_divide_the_batch_and_hardware_comes_from_the_scenario():
    choices = tuple((ExpertChoice(7, tuple(range(7)), "all"),) for _ in CONFIG.blocks)
    space = Space(CONFIG, choices, candidate_windows(CONFIG, ()))
    one = Scenario("one", 64, 64, 8, hardware="h100")
    two = Scenario("two", 64, 64, 16, hardware="h100", devices=2, tensor_parallel=1)
    costs = compute_costs(space.offer, [one, two], "mxfp4", Roofline())
    assert costs.device == "h100"
    assert costs.request_seconds(CONFIG.blocks, "one") == pytest.approx(costs.request_seconds(CONFIG.blocks, "two"))


# Memory -------------------------------------------------------------------------------------------------------------


def test_memory_by_hand():
    scenario = Scenario("s", 8, 8, devices=12, tensor_parallel=3, expert_parallel=6)
    sizes = {"dense": 10, "experts": 100, "kv": 7}
    assert scenario.memory_bytes(**sizes, batch=5) == 4 * 10 + 2 * 100 + 5 * 7
    assert scenario.largest_batch(**sizes, room=268, at_most=9) == 4
    assert scenario.largest_batch(**sizes, room=268, at_most=3) == 3
    assert scenario.largest_batch(**sizes, room=100, at_most=3) == 0
    assert candidate_batches([5, 11]) == (1, 2, 3, 4, 5, 6, 8, 11)
    assert candidate_batches([0, 1]) == (1,)


def test_room_is_a_share_less_the_reserve():
    roofline = Roofline(assumptions=replace(IDEAL, usable_memory=0.5, reserve_bytes=1000))
    scenario = Scenario("s", 8, 8, hardware="tpu-v6e", devices=4)
    assert roofline.room_bytes(scenario) == 4 * (16_000_000_000 - 1000)
    assert roofline.room_bytes(replace(scenario, usable_memory=0.75)) == 4 * (24_000_000_000 - 1000)
    assert roofline.max_batch(scenario) == 1000 and roofline.max_batch(replace(scenario, max_batch=3)) == 3


# Tables -------------------------------------------------------------------------------------------------------------


def test_hardware_table():
    assert hardware_named("h200").bytes_per_second > hardware_named("h100").bytes_per_second
    assert HARDWARE["h100"].memory_bytes == 85_520_809_984  # as nvidia-smi and the driver report it
    with pytest.raises(ConfigError, match="hardware is 'h900', but must be one of local, a100, h100"):
        hardware_named("h900")
    with pytest.raises(ConfigError, match=r"flops_per_second of hardware 'x' is 0\.0, but must be above 0"):
        device("x", rate=0.0)
    with pytest.raises(ConfigError, match="launch_seconds of hardware 'x' is -1, but must be at least 0"):
        device("x", launch_seconds=-1)
    with pytest.raises(ConfigError, match=r"launch_seconds of hardware 'x' is 1000.*, but must be from 0 to 1e"):
        device("x", launch_seconds=10**400)  # more than a float holds


def test_local_hardware_is_measured():
    found = hardware_named("local")
    assert found.bytes_per_second > 0 and found.flops_per_second > 0 and found.memory_bytes > 2**28


def test_assumptions_are_read_whole(tmp_path):
    assert read_assumptions(DEFAULT) == default_assumptions()
    text = DEFAULT.read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("tile_rows: 64", "tile_rows: 16"))
    assert read_assumptions(path) == replace(default_assumptions(), tile_rows=16)
    for old, new, words in (
        ("tile_rows: 64", "", "has no field 'tile_rows'"),
        ("tile_rows: 64", "tile_rows: 0", "tile_rows is 0, but must be at least 1"),
        ("tile_rows: 64", "tile_rows: 64\nother: 1", "other does not exist; there are usable_memory"),
        ("experts: {bandwidth: 0.6", "experts: {bandwidth: 1.6", "efficiency.experts.bandwidth is 1.6"),
        ("link_efficiency: 0.7", "link_efficiency: -1.0", "link_efficiency is -1.0, but must be above 0"),
        ("tile_rows: 64", "tile_rows: [", "cannot be read"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(PuzzleError, match=words) as caught:
            read_assumptions(path)
        assert str(path) in str(caught.value)
    with pytest.raises(PuzzleError, match="cannot be read"):
        read_assumptions(tmp_path / "nowhere.yaml")
