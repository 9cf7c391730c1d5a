"""Seconds from hardware constants: for each part of a step, the larger of bytes / bandwidth and operations / rate.

    seconds of an operation = max(bytes / (bandwidth e_b), operations / (rate e_r)) / devices that share it

e_b and e_r are the shares of the peaks that an operation of this kind reaches; they, launch overheads, tile sizes and
memory limits come from `assumptions.yaml`, device figures from `hardware`. With all shares 1 and no overheads the
result is a lower bound.

    decoding step   one token per request: the weights it touches and caches it reads, averaged over output positions
    prefill step    `prefill_tokens` prompt tokens; as many steps as all prompts need
    experts         bytes of the experts touched, matrix products on whole tiles of rows; see `routing`
    all-reduce      latency + 2 (n-1)/n bytes / link     two per layer under tensor parallelism
    all-to-all      latency + (n-1)/n bytes / link       two per layer in place of the mixture's all-reduce, where
                                                         experts are spread over devices
    memory          dense bytes x replicas + expert bytes x copies + batch x KV  <=  share of memory - reserve

Weights are read in their stored form and multiplied in bfloat16, those of an FP8 checkpoint (experts and the
projections of attention) at the FP8 rate, at which products with an FP8 cache run, too. Left out: memory traffic of
activations, overlap of prefill and decoding, and time spent waiting for the device with the busiest experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import Form, expert_bytes
from puzzle_jax.costs.assumptions import Assumptions, Efficiency, default_assumptions
from puzzle_jax.costs.hardware import Hardware, hardware_named
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.routing import Profile, active_experts, probabilities, tiled_rows
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import ConfigError
from puzzle_jax.numeric import Number

FP8_BYTES, BF16_BYTES, F32_BYTES = 1, 2, 4

PARTS = ("attention_weights", "kv_reads", "router", "experts", "head", "sampling", "collectives", "overheads")
"""Parts that seconds are split into. "kv_reads" is attention proper: cache reads, and queries times keys and values."""


@dataclass(frozen=True)
class PartSeconds:
    """Seconds of a scenario's whole batch by part: prefill of all inputs, and one decoding step (mean)."""

    prefill: Mapping[str, float]
    decode: Mapping[str, float]

    def total(self) -> Seconds:
        return Seconds(sum(self.prefill.values()), sum(self.decode.values()))


@dataclass(frozen=True)
class Roofline:
    """A `provider.Provider` that computes seconds for a `Hardware`, by default the one that a scenario names.

    `profile` says how uneven routing is (see `routing`); None means even routing.
    """

    hardware: Hardware | None = None
    assumptions: Assumptions = field(default_factory=default_assumptions)
    profile: Profile | None = None

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
        """See `provider.Provider`. Raises `ConfigError` for an open batch or a scenario the model cannot serve."""
        steps = self.steps(config, scenario, form)
        return Times(
            experts={count: steps.experts(count).total() for count in counts},
            attention={window: steps.attention(window).total() for window in windows},
            fixed=steps.rest().total(),
        )

    def steps(self, config: ModelConfig, scenario: Scenario, form: Form) -> Steps:
        """Returns the steps of a scenario with a given batch, which give seconds part by part."""
        hardware = self.hardware or hardware_named(scenario.hardware)
        return Steps(config, scenario, form, hardware, self.assumptions, self.profile)

    def room_bytes(self, scenario: Scenario) -> int:
        """Memory of all devices for weights and caches."""
        hardware = self.hardware or hardware_named(scenario.hardware)
        share = self.assumptions.usable_memory if scenario.usable_memory is None else scenario.usable_memory
        return floor(scenario.devices * (share * hardware.memory_bytes - self.assumptions.reserve_bytes))

    def max_batch(self, scenario: Scenario) -> int:
        """Most requests that run together, however little memory they need."""
        return self.assumptions.max_batch if scenario.max_batch is None else scenario.max_batch


@dataclass(frozen=True)
class Steps:
    """Seconds of one scenario's steps, part by part.

    The work is that of one replica: its share of the batch on `tensor_degree` devices.
    """

    config: ModelConfig
    scenario: Scenario
    form: Form
    hardware: Hardware
    assumptions: Assumptions
    profile: Profile | None

    def __post_init__(self) -> None:
        config, scenario = self.config, self.scenario
        if scenario.context_tokens > config.max_position:
            raise ConfigError(
                f"scenario {scenario.name!r} needs {scenario.context_tokens} positions, "
                f"but the model has {config.max_position}"
            )
        if config.num_kv_heads % scenario.tensor_degree:
            raise ConfigError(
                f"tensor_parallel of scenario {scenario.name!r} is {scenario.tensor_degree}, "
                f"but must divide the model's {config.num_kv_heads} KV heads"
            )

    # What one step holds --------------------------------------------------------------------------------------------

    @property
    def requests(self) -> float:
        """Requests of one replica."""
        return self.scenario.given_batch / self.scenario.replicas

    @property
    def prefills(self) -> int:
        """Number of steps that prefill all prompts of one replica."""
        return ceil(self.requests * self.scenario.input_tokens / self.assumptions.prefill_tokens)

    @property
    def prefill_tokens(self) -> float:
        """Prompt tokens of one such step."""
        return self.requests * self.scenario.input_tokens / self.prefills

    def _both(self, step: Callable[[float], Mapping[str, float]]) -> PartSeconds:
        """Seconds of all prefill steps and of a decoding step, given a step's seconds as a function of its tokens."""
        prefill = {part: self.prefills * seconds for part, seconds in step(self.prefill_tokens).items()}
        return PartSeconds(prefill, step(self.requests))

    # Sub-blocks -----------------------------------------------------------------------------------------------------

    def attention(self, window: int | None) -> PartSeconds:
        """One layer's attention."""
        config, scenario = self.config, self.scenario
        weights = config.hidden_size * 2 * (config.query_width + config.kv_width)

        def step(tokens: float) -> dict[str, float]:
            return {
                "attention_weights": self._product(weights, tokens, scenario.tensor_degree, fp8=self.form == "fp8"),
                "collectives": self._all_reduce(tokens),
                "overheads": self.assumptions.operations.attention * self.hardware.launch_seconds,
            }

        found = self._both(step)
        inputs, outputs = scenario.input_tokens, scenario.output_tokens
        read = cache_reads(inputs, self.assumptions.prefill_tokens, window)
        keys = visible_keys(inputs, outputs, window) / outputs
        prefill = self._attended(read, visible_keys(0, inputs, window))
        return PartSeconds(
            {**found.prefill, "kv_reads": prefill}, {**found.decode, "kv_reads": self._attended(keys, keys)}
        )

    def experts(self, count: int) -> PartSeconds:
        """One layer's mixture, router included."""
        config, scenario, assumed = self.config, self.scenario, self.assumptions
        if count % scenario.expert_parallel:
            raise ConfigError(
                f"expert_parallel of scenario {scenario.name!r} is {scenario.expert_parallel}, "
                f"but must divide the {count} experts of a layer"
            )
        one_expert = expert_bytes(config, self.form)
        chosen = probabilities(count, config.experts_per_token, self.profile)
        devices = scenario.expert_degree

        def step(tokens: float) -> dict[str, float]:
            sharing = tokens * devices / scenario.tensor_degree  # tokens that meet on one copy of the experts
            rows = tiled_rows(chosen, ceil(sharing), assumed.tile_rows)
            touched = one_expert * count * active_experts(chosen, sharing) / count
            flops = 2 * rows * 3 * config.hidden_size * config.intermediate_size
            return {
                "router": self._product(config.hidden_size * count, tokens, 1),
                "experts": self._seconds(assumed.efficiency.experts, touched, flops, devices, fp8=self.form == "fp8"),
                "collectives": self._all_reduce(tokens) if scenario.expert_parallel == 1 else self._exchange(tokens),
                "overheads": assumed.operations.experts * self.hardware.launch_seconds,
            }

        return self._both(step)

    def rest(self) -> PartSeconds:
        """Embedding, head on one position per request, the choice of the next token, and host time."""
        config, assumed = self.config, self.assumptions
        devices, head = self.scenario.tensor_degree, config.hidden_size * config.vocab_size

        def step(tokens: float, answered: float) -> dict[str, float]:
            logits = answered * config.vocab_size
            num_bytes = BF16_BYTES * (head + tokens * config.hidden_size)
            passed = assumed.sampling_passes * F32_BYTES * logits
            return {
                "head": self._seconds(assumed.efficiency.head, num_bytes, 2 * answered * head, devices),
                "sampling": self._seconds(assumed.efficiency.head, passed, 0, 1),
                "collectives": self._collective((devices - 1) / devices * BF16_BYTES * logits, devices),
                "overheads": assumed.operations.rest * self.hardware.launch_seconds + assumed.step_seconds,
            }

        prefill = step(self.prefill_tokens, self.requests / self.prefills)
        return PartSeconds(
            {part: self.prefills * seconds for part, seconds in prefill.items()}, step(self.requests, self.requests)
        )

    # Operations -----------------------------------------------------------------------------------------------------

    def _seconds(
        self, reached: Efficiency, num_bytes: Number, flops: Number, devices: int, *, fp8: bool = False
    ) -> float:
        rate = self.hardware.fp8_flops_per_second if fp8 else self.hardware.flops_per_second
        by_memory = num_bytes / (self.hardware.bytes_per_second * reached.bandwidth)
        return max(by_memory, flops / (rate * reached.rate)) / devices

    def _product(self, weights: int, tokens: float, devices: int, *, fp8: bool = False) -> float:
        """Seconds to multiply tokens with a matrix of that many weights, in bfloat16 or FP8."""
        num_bytes = (FP8_BYTES if fp8 else BF16_BYTES) * weights
        return self._seconds(self.assumptions.efficiency.dense, num_bytes, 2 * tokens * weights, devices, fp8=fp8)

    def _attended(self, read: Number, keys: Number) -> float:
        """Seconds of attention where every request reads `read` slots and its queries see `keys` keys in total."""
        config, reached, kv_bytes = self.config, self.assumptions.efficiency.attention, self.scenario.kv_bytes_per_value
        rate = self.hardware.fp8_flops_per_second if kv_bytes == 1 else self.hardware.flops_per_second
        by_memory = read * 2 * config.kv_width * kv_bytes / (self.hardware.bytes_per_second * reached.bandwidth)
        by_rate = 2 * 2 * keys * config.query_width / (rate * reached.rate)
        return self.requests * max(by_memory, by_rate) / self.scenario.tensor_degree

    def _all_reduce(self, tokens: float) -> float:
        """Seconds to sum the hidden states of all tokens over a replica's devices, in a ring."""
        devices = self.scenario.tensor_degree
        hidden_bytes = BF16_BYTES * tokens * self.config.hidden_size
        return self._collective(2 * (devices - 1) / devices * hidden_bytes, devices)

    def _exchange(self, tokens: float) -> float:
        """Seconds to send each token's hidden state to its experts' devices and back."""
        devices = self.scenario.expert_parallel
        own = tokens / self.scenario.tensor_degree
        sent = (devices - 1) / devices * own * self.config.experts_per_token * BF16_BYTES * self.config.hidden_size
        return 2 * self._collective(sent, devices)

    def _collective(self, sent: Number, devices: int) -> float:
        """Seconds of a collective operation in which every device sends `sent` bytes."""
        if devices == 1:
            return 0.0
        link = self.hardware.link_bytes_per_second * self.assumptions.link_efficiency
        return self.hardware.link_latency_seconds + sent / link


def visible_keys(first: int, count: int, window: int | None) -> int:
    """Keys seen, summed over the queries at positions first to first + count - 1."""

    def up_to(position: int) -> int:
        """Summed over the queries before a position."""
        if window is None or position <= window:
            return position * (position + 1) // 2
        return window * (window + 1) // 2 + (position - window) * window

    return up_to(first + count) - up_to(first)


def cache_reads(inputs: int, chunk: int, window: int | None) -> int:
    """Slots read while a prompt is prefilled: each chunk reads once what any of its queries sees."""
    total = 0
    for start in range(0, inputs, chunk):
        end = min(start + chunk, inputs)
        total += end if window is None else min(end, end - start + window - 1)
    return total
