"""Seconds from compiled programs: the CPU compiler's counts against counts by hand, and a TPU's if it is installed."""

import importlib.util
from dataclasses import asdict
from unittest.mock import Mock

import jax
import pytest

from puzzle_jax.costs.hardware import Hardware, hardware_named
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.costs.sub_blocks import SubBlocks
from puzzle_jax.costs.xla import Work, Xla, tpu_device
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.chunk_attention.blocks import key_block
from puzzle_jax.kernels.expert_mlp.capacity import round_rows
from tests.support import small_config

CONFIG = small_config(hidden_size=160, intermediate_size=112, head_dim=48, vocab_size=997)
BATCH = 20
CHAT = Scenario("chat", input_tokens=250, output_tokens=70, batch=BATCH, hardware="tpu-v5e")
COUNTS_FLOPS = Hardware("operations", 1, 1e30, 1, 1, 1, 0, 0)
"""Hardware on which a program's seconds are its operations."""


def cpu(hardware):
    return jax.devices("cpu")[0]


def times(counts, windows, scenario=CHAT, **options):
    return Xla(cpu, **options).times(CONFIG, scenario, "bf16", counts, windows)


# What is counted ----------------------------------------------------------------------------------------------------

# Products are counted exactly. Norms, softmax and SwiGLU add an operation per element, and so do weights that a CPU
# converts to float32: one operation next to the forty of 20 rows. Together these were at most 6%.
ABOVE_PRODUCTS = 1.08


@pytest.fixture(scope="module")
def counted():
    """Times whose seconds are operations, and the turns that were reported."""
    turns = []
    found = times(
        (7, 4), (None, 24), hardware=COUNTS_FLOPS, progress=lambda done, parts: turns.append(f"{done}/{parts}")
    )
    return found, turns


BLOCKS = SubBlocks(CONFIG, CHAT)


@pytest.mark.parametrize("count", [7, 4])
def test_operations_of_a_mixture_by_hand(counted, count):
    def by_hand(tokens):
        rows = round_rows(tokens, tokens * CONFIG.experts_per_token, count)
        experts = count * rows * 3 * CONFIG.hidden_size * CONFIG.intermediate_size
        return 2 * (experts + tokens * CONFIG.hidden_size * count)

    assert (BLOCKS.rows, BLOCKS.chunk, BLOCKS.chunks, BLOCKS.groups) == (10, 64, 4, 2.0)
    check(counted[0].experts[count], 2 * 4 * by_hand(10 * 64), by_hand(BATCH))


@pytest.mark.parametrize("window", [None, 24])
def test_operations_of_attention_by_hand(counted, window):
    """A chunk reads all filled blocks of cached keys, although the compiler counts a loop's body once."""
    slots = window or BLOCKS.context
    weights = 2 * CONFIG.hidden_size * (CONFIG.query_width + CONFIG.kv_width)
    cached = sum(-(-min(start, slots) // key_block(slots)) * key_block(slots) for start in (0, 64, 128, 192))
    prefill = BATCH * 64 * (4 * weights + 2 * (cached + 4 * 64) * CONFIG.query_width)
    decode = BATCH * (weights + 2 * slots * CONFIG.query_width)
    turned = 3 * BATCH * slots * 2 * CONFIG.kv_width  # cached values, converted to float32 and back on a CPU
    check(counted[0].attention[window], 2 * prefill, 2 * decode, turned)


def test_operations_of_embedding_and_head_by_hand(counted):
    head = 2 * BATCH * CONFIG.hidden_size * CONFIG.vocab_size
    embedded = BATCH * CHAT.input_tokens * CONFIG.hidden_size
    found = counted[0].fixed
    assert (
        head < found.prefill_seconds < ABOVE_PRODUCTS * head + 2 * embedded
    )  # which a CPU converts to float32 and back
    assert head < found.decode_seconds < ABOVE_PRODUCTS * head


def check(found, prefill, decode, turned=0):
    assert prefill < found.prefill_seconds < ABOVE_PRODUCTS * prefill
    assert decode < found.decode_seconds < ABOVE_PRODUCTS * decode + turned


def test_turns_are_reported(counted):
    assert counted[1] == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_seconds_are_those_of_what_takes_longer():
    hardware = hardware_named("tpu-v5e")
    work = Work.of(Mock(spec=jax.stages.Compiled, cost_analysis=lambda: {"flops": 197e9, "bytes accessed": 819e6}))
    assert work == Work(197e9, 819e6)
    assert work.seconds(hardware) == pytest.approx(1e-3)
    assert Work(197e9, 4 * 819e6).seconds(hardware) == pytest.approx(4e-3)
    assert Work(10.0, 7.0).with_more(Work(12.0, 6.0), 3) == Work(16.0, 7.0)


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": 2}, "asks for 2 devices and 2 bytes per cached value, but xla costs are of 1 device"),
        ({"kv_bytes_per_value": 1}, "asks for 1 devices and 1 bytes per cached value"),
    ],
)
def test_other_deployments_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        times((7,), (None,), Scenario(**{**asdict(CHAT), **changes}))


def test_other_hardware_is_refused():
    with pytest.raises(ConfigError, match="hardware is 'h100', but xla costs are of tpu-v5e, tpu-v5p, tpu-v6e"):
        tpu_device("h100")


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"xla costs need XLA's compiler for TPUs: pip install 'jax\[tpu\]'"):
        Xla()


def test_what_does_not_fit_is_one_sentence(monkeypatch):
    def refuse(compiled):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in hbm\nUsed 17G of 15G")

    monkeypatch.setattr(Work, "of", staticmethod(refuse))
    with pytest.raises(ConfigError) as caught:
        times((4,), (None,))
    assert (
        str(caught.value)
        == "prefill of 4 experts does not compile for tpu-v5e: RESOURCE_EXHAUSTED: Ran out of memory in hbm"
    )


# A TPU's own compiler -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
def test_a_tpu_that_is_not_there():
    """Decoding is bound by reading the weights: what does not fit on the chip cannot be copied there often."""
    config = small_config(hidden_size=2048, intermediate_size=1920, vocab_size=1000, head_dim=64)
    scenario = Scenario("short", input_tokens=60, output_tokens=60, batch=2, hardware="tpu-v5e")
    found = Xla().times(config, scenario, "bf16", (16, 11), (24,))
    bandwidth = hardware_named("tpu-v5e").bytes_per_second
    for count in (16, 11):
        reading = count * 3 * config.hidden_size * config.intermediate_size * 2 / bandwidth
        assert reading < found.experts[count].decode_seconds < 3 * reading
    assert 0 < found.attention[24].decode_seconds < found.attention[24].prefill_seconds
    assert found.fixed.prefill_seconds > 0
