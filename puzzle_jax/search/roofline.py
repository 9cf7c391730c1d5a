"""Seconds from hardware constants: per sub-block the larger of bytes / bandwidth and operations / rate.

    prefill: weights once, every token's work;   decode: weights that a step touches, the cache that it reads
    experts touched by n tokens = E (1 - (1 - k / E)^n), each token choosing k of E evenly

Weights are read in their resting form (experts as in the checkpoint, the rest bfloat16), multiplied in
bfloat16. Several devices divide bytes and operations evenly. These are floors: real kernels reach part of
them.

Left out: activations' own traffic, launch and collective overheads, tiles that few tokens do not fill, and
uneven routing, which touches fewer experts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import jax
import jax.numpy as jnp

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.table import Form, bytes_by_part
from puzzle_jax.errors import ConfigError
from puzzle_jax.search.costs import Seconds, Times
from puzzle_jax.search.library import Number
from puzzle_jax.search.scenario import Scenario

BF16_BYTES = 2


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      name: as scenarios call it.
      bytes_per_second: memory bandwidth.
      flops_per_second: dense bfloat16 matrix rate, a multiply and an add counting as two.
    """

    name: str
    bytes_per_second: Number
    flops_per_second: Number

    def __post_init__(self) -> None:
        for field in ("bytes_per_second", "flops_per_second"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
                raise ConfigError(f"{field} of hardware {self.name!r} is {value!r}, but must be above 0")


# From the makers' data sheets: dense bfloat16 rates, without sparsity.
HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # NVIDIA A100 80GB SXM data sheet: 2,039 GB/s, 312 TFLOP/s.
        Hardware("a100", 2.039e12, 312e12),
        # NVIDIA H100 SXM5 data sheet: 3.35 TB/s, 989.4 TFLOP/s.
        Hardware("h100", 3.35e12, 989.4e12),
        # NVIDIA H200 SXM data sheet: 4.8 TB/s, 989.4 TFLOP/s.
        Hardware("h200", 4.8e12, 989.4e12),
        # NVIDIA HGX B200 data sheet, per GPU: 8 TB/s, 2,250 TFLOP/s.
        Hardware("b200", 8.0e12, 2250e12),
        # Google Cloud TPU documentation, per chip: v5e 819 GB/s, 197 TFLOP/s.
        Hardware("tpu-v5e", 8.19e11, 197e12),
        # v5p: 2,765 GB/s, 459 TFLOP/s.
        Hardware("tpu-v5p", 2.765e12, 459e12),
        # v6e (Trillium): 1,640 GB/s, 918 TFLOP/s.
        Hardware("tpu-v6e", 1.64e12, 918e12),
    )
}


def hardware_named(name: str) -> Hardware:
    """A row of `HARDWARE`, or for "local" the device present, measured.

    Raises `ConfigError` for another name.
    """
    if name == "local":
        return measure_local()
    if name not in HARDWARE:
        raise ConfigError(f"hardware is {name!r}, but must be local or one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def measure_local(size: int = 1024, copy_bytes: int = 1 << 27, rounds: int = 5) -> Hardware:
    """Rates that one large matrix product and one large copy reach on the default device."""
    device = jax.devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    square = jnp.ones((size, size), dtype)
    long = jnp.ones(copy_bytes // 4, jnp.float32)
    product_seconds = _best_seconds(jax.jit(lambda x: x @ x), square, rounds)
    copy_seconds = _best_seconds(jax.jit(lambda x: x + 1), long, rounds)
    return Hardware(device.device_kind, 2 * copy_bytes / copy_seconds, 2 * size**3 / product_seconds)


def _best_seconds(function, x: jax.Array, rounds: int) -> float:
    function(x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        function(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Roofline:
    """Provider of `puzzle_jax.search.costs`: arithmetic on a `Hardware`, by default the one that a scenario names."""

    hardware: Hardware | None = None

    @property
    def name(self) -> str:
        return "roofline"

    def device(self, scenario: Scenario) -> str:
        return self.hardware.name if self.hardware else scenario.hardware

    def times(
        self,
        config: ModelConfig,
        scenario: Scenario,
        form: Form,
        counts: Sequence[int],
        windows: Sequence[int | None],
    ) -> Times:
        """See `costs.Provider`."""
        device = _Devices(self.hardware or hardware_named(scenario.hardware), scenario.devices)
        return Times(
            experts={count: _experts(device, config, scenario, form, count) for count in counts},
            attention={window: _attention(device, config, scenario, window) for window in windows},
            fixed=_fixed(device, config, scenario),
        )


@dataclass(frozen=True)
class _Devices:
    """So many devices that share all work evenly."""

    hardware: Hardware
    count: int

    def seconds(self, num_bytes: Number, flops: Number) -> float:
        slower = max(num_bytes / self.hardware.bytes_per_second, flops / self.hardware.flops_per_second)
        return slower / self.count


def _experts(devices: _Devices, config: ModelConfig, scenario: Scenario, form: Form, count: int) -> Seconds:
    one = config.with_blocks((BlockConfig(count), *config.blocks[1:]))
    layer = bytes_by_part(one, form).layers[0]
    per_token = config.experts_per_token * 3 * config.hidden_size * config.intermediate_size
    per_token += config.hidden_size * count

    def seconds(tokens: int) -> float:
        touched = active_experts(count, config.experts_per_token, tokens)
        return devices.seconds(layer.router + layer.experts * touched / count, 2 * tokens * per_token)

    return Seconds(seconds(scenario.batch * scenario.input_tokens), seconds(scenario.batch))


def _attention(devices: _Devices, config: ModelConfig, scenario: Scenario, window: int | None) -> Seconds:
    weights = config.hidden_size * 2 * (config.query_width + config.kv_width)
    inputs, outputs, batch = scenario.input_tokens, scenario.output_tokens, scenario.batch
    kv_token_bytes = 2 * config.kv_width * scenario.kv_bytes_per_value

    def seconds(cache_tokens: Number, queries: int, keys: Number) -> float:
        """Of one request's cache traffic, its queries, and the keys that those see together."""
        num_bytes = BF16_BYTES * weights + batch * cache_tokens * kv_token_bytes
        return devices.seconds(num_bytes, 2 * batch * (queries * weights + 2 * config.query_width * keys))

    step_keys = visible_keys(inputs, outputs, window) / outputs
    return Seconds(seconds(inputs, inputs, visible_keys(0, inputs, window)), seconds(step_keys, 1, step_keys))


def _fixed(devices: _Devices, config: ModelConfig, scenario: Scenario) -> Seconds:
    """Embedding rows, and the head on one position per request."""
    head = config.hidden_size * config.vocab_size

    def seconds(tokens: int) -> float:
        num_bytes = BF16_BYTES * (head + tokens * config.hidden_size)
        return devices.seconds(num_bytes, 2 * scenario.batch * head)

    return Seconds(seconds(scenario.batch * scenario.input_tokens), seconds(scenario.batch))


def active_experts(num_experts: int, experts_per_token: int, tokens: Number) -> float:
    """Expected number of experts that at least one of the tokens chooses, each choosing evenly."""
    return num_experts * (1.0 - (1.0 - experts_per_token / num_experts) ** tokens)


def visible_keys(first: int, count: int, window: int | None) -> int:
    """Keys seen, summed over the queries at positions first to first + count - 1."""

    def up_to(position: int) -> int:
        """Summed over the queries before a position."""
        if window is None or position <= window:
            return position * (position + 1) // 2
        return window * (window + 1) // 2 + (position - window) * window

    return up_to(first + count) - up_to(first)
