"""Costs against numbers worked out by hand, and the form of measured ones."""

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import pytest

from puzzle_jax.config import BlockConfig, ModelConfig, cache_bytes
from puzzle_jax.convert_hf.table import tensor_bytes
from puzzle_jax.costs.compute import compute_costs
from puzzle_jax.costs.external import read_external
from puzzle_jax.costs.hardware import hardware_named
from puzzle_jax.costs.measured import Measured, _Part
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.roofline import Roofline
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.costs.table import read_costs
from puzzle_jax.errors import ConfigError, PuzzleError
from puzzle_jax.model.spec import count_params
from puzzle_jax.search.space import ExpertChoice, Space, candidate_windows
from tests.support import small_config

CONFIG = small_config((BlockConfig(7, 5), BlockConfig(7), BlockConfig(7, 5)), hidden_size=64, intermediate_size=32)
CHAT = Scenario("chat", input_tokens=12, output_tokens=6, batch=3)
LONG = Scenario("long", input_tokens=90, output_tokens=30, batch=2, kv_bytes_per_value=1)


def space_of(config, counts, windows):
    choices = tuple(
        tuple(ExpertChoice(c, tuple(range(c)), "reap") for c in counts if c <= block.num_experts)
        for block in config.blocks
    )
    return Space(config, choices, candidate_windows(config, windows))


SPACE = space_of(CONFIG, (7, 5, 3), (8,))


class Fixed:
    """A provider of round numbers: experts cost their count, attention its window, in milliseconds."""

    name = "by hand"

    def device(self, scenario):
        return "paper"

    def times(self, config, scenario, form, counts, windows):
        return Times(
            experts={c: Seconds(0.010 * c, 0.001 * c) for c in counts},
            attention={w: Seconds(0.020, 0.001 * (w or scenario.context_tokens)) for w in windows},
            fixed=Seconds(0.5, 0.25),
        )


@pytest.fixture(scope="module")
def costs():
    return compute_costs(SPACE.offer, [CHAT, LONG], "mxfp4", Fixed())


BLOCKS = (BlockConfig(5, 5), BlockConfig(3, 8), BlockConfig(7, 5))


@pytest.mark.parametrize("form", ["mxfp4", "bf16"])
@pytest.mark.parametrize("blocks", [CONFIG.blocks, BLOCKS])
def test_bytes_and_parameters_are_those_of_the_checkpoint(form, blocks):
    costs = compute_costs(SPACE.offer, [CHAT], form, Fixed())
    assert costs.weight_bytes(blocks) == tensor_bytes(CONFIG.with_blocks(blocks), form)
    assert costs.parameters(blocks) == count_params(CONFIG.with_blocks(blocks))


def test_bytes_by_hand(costs):
    # One expert: 64 x 64 and 32 x 64 at 4.25 bits, 64 + 64 biases at 16; its router row: 64 weights and a bias at 16.
    expert = (64 * 64 + 32 * 64) * 17 // 32 + 2 * 128
    assert costs.experts_of(1, BlockConfig(5)).weight_bytes == 5 * (expert + 2 * 65)
    assert costs.experts_of(1, BlockConfig(5)).parameters == 5 * (64 * 64 + 32 * 64 + 128 + 65)
    assert costs.expert_bytes(BLOCKS) == 15 * (expert + 2 * 65)
    # 2 (keys and values) x 3 heads x 10 dimensions x bytes per value, per slot
    assert costs.attention_of(1, BlockConfig(1, None)).kv_bytes == {"chat": 18 * 60 * 2, "long": 120 * 60}
    assert costs.kv_bytes(BLOCKS, "chat") == (5 + 8 + 5) * 60 * 2
    assert costs.kv_bytes(CONFIG.blocks, "long") == (5 + 120 + 5) * 60
    assert costs.kv_bytes(BLOCKS, "chat") == cache_bytes(CONFIG.with_blocks(BLOCKS), 18, 2)


def test_published_models():
    """gpt-oss-20b's checkpoint is 13,761,264,768 bytes, one of its experts 13,236,480."""
    layers = tuple(BlockConfig(32, None if layer % 2 else 128) for layer in range(24))
    config = ModelConfig(201088, 2880, 2880, 64, 8, 64, 4, layers)
    costs = compute_costs(space_of(config, (32, 16), (1024,)).offer, [CHAT], "mxfp4", Roofline(hardware_named("h100")))
    assert costs.weight_bytes(layers) == 13_761_264_768
    assert costs.experts_of(0, BlockConfig(16)).weight_bytes == 16 * (13_236_480 + 2 * 2881)


def test_seconds_by_hand(costs):
    prefill = 0.5 + 0.010 * 15 + 3 * 0.020
    decode = 0.25 + 0.001 * 15 + 0.001 * 18
    assert costs.prefill_seconds(BLOCKS) == pytest.approx(prefill)
    assert costs.decode_seconds(BLOCKS) == pytest.approx(decode)
    assert costs.request_seconds(BLOCKS) == pytest.approx(prefill + 6 * decode)
    assert costs.tokens_per_second(BLOCKS) == pytest.approx(3 * 6 / (prefill + 6 * decode))
    parent = 0.25 + 0.001 * 21 + 0.001 * (5 + 120 + 5)
    assert costs.decode_seconds(CONFIG.blocks, "long") == pytest.approx(parent)


def reread(costs, path):
    path.write_text(json.dumps(costs.to_json()))
    return read_costs(path)


def test_json_and_back(costs, tmp_path):
    path = tmp_path / "costs.json"
    assert reread(costs, path) == costs
    assert json.loads(path.read_text())["layers"][1]["attention"]["full"]["kv_bytes"]["chat"] == 2160


def edited(costs, change):
    value = costs.to_json()
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.pop("shared_bytes"), "has no field 'shared_bytes'"),
        (lambda v: v["fixed"]["chat"].update(decode_seconds=math.nan), "decode_seconds is nan"),
        (lambda v: v["fixed"]["chat"].update(decode_seconds=-1), "decode_seconds is -1"),
        (lambda v: v["fixed"]["chat"].update(other=1), "fixed.other does not exist"),
        (lambda v: v["scenarios"][0].update(batch=0), "batch of scenario 'chat' is 0"),
        (lambda v: v["layers"][0]["experts"].update(many={}), "key in .*experts is a text, but must be a whole number"),
        (lambda v: v["layers"][1]["attention"].update(many={}), "a window is 'many', but must be full or a whole"),
        (lambda v: v["layers"][1].pop("experts"), r"layers\[1\] has no field 'experts'"),
    ],
)
def test_damaged_files_are_refused(costs, tmp_path, change, words):
    path = tmp_path / "costs.json"
    path.write_text(edited(costs, change))
    with pytest.raises(PuzzleError, match=words) as caught:
        read_costs(path)
    assert str(path) in str(caught.value)


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(PuzzleError, match=r"nowhere.json cannot be read: No such file"):
        read_costs(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PuzzleError, match=r"broken.json cannot be read as JSON"):
        read_costs(tmp_path / "broken.json")


def test_unknown_alternatives_are_named(costs):
    with pytest.raises(ConfigError, match="layer 0 has no expert count 6; known: 7, 5, 3"):
        costs.expert_bytes((BlockConfig(6, 5), *BLOCKS[1:]))
    with pytest.raises(ConfigError, match="layer 1 has no window 9; known: full, 8"):
        costs.request_seconds((BLOCKS[0], BlockConfig(3, 9), BLOCKS[2]))
    with pytest.raises(ConfigError, match="2 blocks were given, but the costs are of 3 layers"):
        costs.expert_bytes(BLOCKS[:2])
    with pytest.raises(ConfigError, match="no scenario 'batch'; known: chat, long"):
        costs.kv_bytes(BLOCKS, "batch")
    with pytest.raises(ConfigError, match="distinct names"):
        compute_costs(SPACE.offer, [CHAT, CHAT], "mxfp4", Fixed())


def test_parent_has_costs_even_where_its_count_is_no_alternative():
    costs = compute_costs(space_of(CONFIG, (4,), ()).offer, [CHAT], "mxfp4", Fixed())
    four = tuple(BlockConfig(4, block.window) for block in CONFIG.blocks)
    assert costs.expert_bytes(CONFIG.blocks) * 4 == costs.expert_bytes(four) * 7


# --- open batches ------------------------------------------------------------------------------------------------

OPEN = Scenario("open", input_tokens=90, output_tokens=30)
# A request's cache has 130 slots of 120 bytes in the parent, 18 in the smallest architecture (windows 5, 8, 5).
PARENT_KV, SMALLEST_KV = 130 * 120, 18 * 120


class Room:
    """Memory for the parent and four and a half of its requests; 40 requests at most."""

    def room_bytes(self, scenario):
        return tensor_bytes(CONFIG, "mxfp4") + 4 * PARENT_KV + PARENT_KV // 2

    def max_batch(self, scenario):
        return 40


class SlowerByBatch(Fixed):
    """A step takes longer with more requests, but less than in proportion."""

    def times(self, config, scenario, form, counts, windows):
        found = super().times(config, scenario, form, counts, windows)
        seconds = Seconds(0.5 * scenario.batch, 0.25 + 0.01 * scenario.batch)
        return Times(found.experts, found.attention, seconds)


@pytest.fixture(scope="module")
def opened():
    return compute_costs(SPACE.offer, [CHAT, OPEN], "mxfp4", SlowerByBatch(), memory=Room())


def test_open_batches_reach_from_one_to_the_smallest_architecture_s(opened, tmp_path):
    assert opened.offered_batches("chat") == (3,)
    assert opened.offered_batches("open") == (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40)
    assert opened.room_bytes == {"open": Room().room_bytes(OPEN)}
    assert set(opened.fixed) == {"chat", *(f"open.{batch}" for batch in opened.offered_batches("open"))}
    assert reread(opened, tmp_path / "costs.json") == opened


def test_each_architecture_takes_its_own_best_batch(opened):
    smallest = (BlockConfig(3, 5), BlockConfig(3, 8), BlockConfig(3, 5))
    assert opened.best_batch(CONFIG.blocks, "open") == 4
    assert opened.best_batch(smallest, "open") == 40
    decode = 0.25 + 0.04 + 0.001 * 21 + 0.001 * 130
    seconds = 0.5 * 4 + 0.010 * 21 + 3 * 0.020 + 30 * decode
    assert opened.tokens_per_second(CONFIG.blocks, "open") == pytest.approx(4 * 30 / seconds)
    assert opened.tokens_per_second(CONFIG.blocks, "open", 1) < opened.tokens_per_second(CONFIG.blocks, "open")
    assert opened.memory_bytes(CONFIG.blocks, "open", 4) == tensor_bytes(CONFIG, "mxfp4") + 4 * PARENT_KV


def test_open_batches_need_memory():
    with pytest.raises(ConfigError, match="scenario 'open' leaves its batch open, but no memory is known"):
        compute_costs(SPACE.offer, [OPEN], "mxfp4", Fixed())

    class None_(Room):
        def room_bytes(self, scenario):
            return 1000

    with pytest.raises(ConfigError, match="not even the smallest architecture fits"):
        compute_costs(SPACE.offer, [OPEN], "mxfp4", Fixed(), memory=None_())
    with pytest.raises(ConfigError, match="batch of scenario 'open' is None, but must be given here"):
        Measured().times(CONFIG, OPEN, "bf16", [7], [None])


# --- costs from elsewhere ----------------------------------------------------------------------------------------


def test_costs_from_elsewhere_are_taken_as_they_are(costs, tmp_path):
    path = tmp_path / "timed.json"
    path.write_text(json.dumps(costs.to_json()))
    assert read_external(path, SPACE.offer, [CHAT, LONG], "mxfp4") == costs
    assert read_external(path, space_of(CONFIG, (7, 3), ()).offer, [LONG], "mxfp4") == replace(costs, scenarios=(LONG,))


def _experts(value):
    return value["layers"][2]["experts"]["3"]


def _seconds(value):
    return _experts(value)["seconds"]["chat"]


def _cache(value):
    return value["layers"][0]["attention"]["5"]["kv_bytes"]


def _no_time(value, field):
    tables = [value["fixed"]]
    for layer in value["layers"]:
        tables += [entry["seconds"] for entry in (*layer["experts"].values(), *layer["attention"].values())]
    for table in tables:
        table["chat"][field] = 0


@pytest.mark.parametrize(
    ("space", "scenario", "change", "words"),
    [
        (space_of(CONFIG, (7, 6, 4), (8,)), CHAT, None, "lack layer 0: expert counts 6, 4; layer 1: expert counts 6"),
        (space_of(CONFIG, (7,), (9, 8)), CHAT, None, "lack layer 1: windows 9"),
        (SPACE, OPEN, None, "no scenario 'open'; known: chat, long"),
        (SPACE, CHAT.at(4), None, "batch of scenario 'chat' is 3, but 4 is asked for"),
        (SPACE, CHAT, lambda v: v["layers"].pop(), "costs are of 2 layers, but the parent has 3"),
        (SPACE, CHAT, lambda v: v["fixed"].pop("long"), "the costs lack seconds of 'long'"),
        (
            SPACE,
            CHAT,
            lambda v: v["scenarios"][1].update(batch=None),
            "scenario 'long' leaves its batch open, but the costs lack its batches",
        ),
        (SPACE, CHAT, lambda v: v.update(shared_parameters=-2), "shared_parameters is -2, but must be at least 0"),
        (SPACE, CHAT, lambda v: v.update(shared_bytes=7), "shared_bytes is 7, but the model has"),
        (SPACE, CHAT, lambda v: _experts(v).update(weight_bytes=-1), "layer 2, expert count 3: weight_bytes is -1"),
        (SPACE, CHAT, lambda v: _experts(v).update(weight_bytes=8), "layer 2, expert count 3: weight_bytes is 8, but"),
        (
            SPACE,
            CHAT,
            lambda v: _experts(v).update(parameters=True),
            "layer 2, expert count 3: parameters is true or false, but",
        ),
        (
            SPACE,
            CHAT,
            lambda v: _seconds(v).update(decode_seconds=-1),
            "expert count 3: decode_seconds is -1, but must",
        ),
        (SPACE, CHAT, lambda v: _seconds(v).update(decode_seconds=10**400), "decode_seconds is 1000"),
        (SPACE, CHAT, lambda v: _seconds(v).update(decode_seconds=math.nan), "decode_seconds is nan"),
        (
            SPACE,
            CHAT,
            lambda v: _seconds(v).update(decode_seconds=True),
            "decode_seconds is true or false, but must be a number",
        ),
        (SPACE, LONG, lambda v: _cache(v).update(long=7), "layer 0, window 5: kv_bytes of scenario 'long' is 7, but"),
        (SPACE, CHAT, lambda v: _no_time(v, "decode_seconds"), "decode_seconds of 'chat' is 0 in all parts"),
        (SPACE, CHAT, lambda v: _no_time(v, "prefill_seconds"), "prefill_seconds of 'chat' is 0 in all parts"),
    ],
)
def test_costs_from_elsewhere_that_lack_something_are_refused(costs, tmp_path, space, scenario, change, words):
    path = tmp_path / "timed.json"
    path.write_text(edited(costs, change or (lambda value: None)))
    with pytest.raises(PuzzleError, match=words) as caught:
        read_external(path, space.offer, [scenario], "mxfp4")
    assert str(path) in str(caught.value)


# --- measured ----------------------------------------------------------------------------------------------------


def test_measured_times_every_part_and_reports_turns(tmp_path):
    turns = []
    provider = Measured(rounds=2, decode_steps=3, progress=lambda done, total: turns.append((done, total)))
    costs = compute_costs(space_of(CONFIG, (7, 3), (8,)).offer, [CHAT], "mxfp4", provider)
    assert costs.provider == "measured" and costs.device
    # Prefill and decode of attention, experts and the rest by themselves, and of three trials next to the reference.
    parts = 2 * (3 + 3 * 2)
    assert turns == [(turn + 1, parts * 3) for turn in range(parts * 3)]
    for layer in costs.layers:
        for entry in (*layer.experts.values(), *layer.attention.values()):
            assert set(entry.seconds) == {"chat"}
    # The reference has the most experts and the widest attention; the rest is what differs from it.
    for entry in (costs.layers[1].experts[7], costs.layers[1].attention[None]):
        assert entry.seconds["chat"].prefill_seconds > 0 and entry.seconds["chat"].decode_seconds > 0
    assert costs.fixed["chat"].prefill_seconds > 0 and costs.fixed["chat"].decode_seconds > 0
    assert costs.layers[0].attention[5].seconds == costs.layers[2].attention[5].seconds
    assert costs.tokens_per_second(CONFIG.blocks) > 0
    assert reread(costs, tmp_path / "costs.json") == costs


def test_errors_of_timings_by_hand(costs):
    """Layers of the same kind share an error; others add in quadrature, weighted by seconds of prefill and decode."""
    assert costs.speed_error(BLOCKS) == 0.0
    blocks = (BlockConfig(5, 5), BlockConfig(5, 8), BlockConfig(7, 5))
    experts = {5: 0.03, 7: 0.06, 3: 9.0}
    layers = tuple(
        replace(
            layer,
            experts={n: with_errors(one, 0.5 * experts[n], experts[n]) for n, one in layer.experts.items()},
            attention={w: with_errors(one, 0.0, 0.12 if w == 8 else 0.0) for w, one in layer.attention.items()},
        )
        for layer in costs.layers
    )
    uncertain = replace(costs, layers=layers)
    decode = ((2 / 3 * 0.03) ** 2 + (1 / 3 * 0.06) ** 2 + (1 / 3 * 0.12) ** 2) ** 0.5
    prefill = 0.5 * ((2 / 3 * 0.03) ** 2 + (1 / 3 * 0.06) ** 2) ** 0.5
    seconds, of_decoding = costs.prefill_seconds(blocks), 6 * costs.decode_seconds(blocks)
    expected = (seconds * prefill + of_decoding * decode) / (seconds + of_decoding)
    assert uncertain.speed_error(blocks) == pytest.approx(expected)


def with_errors(part, prefill, decode):
    seconds = {name: replace(each, prefill_error=prefill, decode_error=decode) for name, each in part.seconds.items()}
    return replace(part, seconds=seconds)


@pytest.mark.parametrize(("restless", "rounds"), [(0.0, 4), (0.5, 12)])
def test_rounds_that_disagree_are_repeated(restless, rounds):
    """By the clock here the second part takes 1.2 seconds, and `restless` more in every other round."""
    ran, now = [], [0.0]

    def part(name, seconds):
        def run(state):
            ran.append(name)
            now[0] += seconds + restless * (name == "second" and state % 2)
            return state + 1

        return _Part(run, 0, 1.0)

    provider, turns = Measured(rounds=4, clock=lambda: now[0]), []
    first, second = provider._timed([part("first", 1.0), part("second", 1.2)], lambda: turns.append(1))
    assert first == pytest.approx([1.0] * rounds)
    assert second == pytest.approx([1.2 + restless, 1.2] * (rounds // 2))
    assert ran.count("first") == ran.count("second") == rounds + 1 and len(turns) == 2 * 5


def test_measured_refuses_what_it_cannot_time():
    for scenario in (Scenario("a", 8, 4, 2, devices=2), Scenario("b", 8, 4, 2, hardware="h100")):
        with pytest.raises(ConfigError, match="measured costs are of one local device"):
            Measured(dtype=jnp.float32).times(CONFIG, scenario, "bf16", [7], [None])
    with pytest.raises(ConfigError, match="rounds is 0"):
        Measured(rounds=0)
