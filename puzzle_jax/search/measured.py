"""Seconds of our own sub-blocks on the device present, at the exact shapes of a scenario.

Attention is timed for each distinct window and the mixture for each distinct expert count, with random parameters:
in prefill as the generation engine does it, in chunks of a group of rows, and in decoding as a loop on the device of
many steps of one sub-block, against a cache of the layer's own size, so that no dispatch is counted. What all
architectures share (embedding, head, the choice of the next token) is timed likewise. All parts take turns, round by
round, so that a drifting machine harms none; medians over rounds are kept with their spread.

Left out: several devices, routing as uneven as a trained router's, and what XLA fuses across sub-blocks.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.errors import ConfigError
from puzzle_jax.model.cache import init_cache
from puzzle_jax.model.network import moe_block
from puzzle_jax.model.spec import Params, is_spec, param_specs
from puzzle_jax.search.provider import Seconds, Times
from puzzle_jax.search.scenario import Scenario
from puzzle_jax.search.sub_blocks import SubBlocks, without_layers

# A decoding loop starts every step from one of so many hidden states: with the state carried alone, routing
# would settle on few experts.
_STATES = 8


class _Part(NamedTuple):
    """Something to time: `run` maps a state to the next; `steps` is what its seconds are divided by.

    Steps are a fraction where a run is less than one: a group of rows is one part of a batch.
    """

    run: Callable[[Any], Any]
    state: Any
    steps: float


@dataclass(frozen=True)
class Measured:
    """A `provider.Provider`: times the default device.

    Attributes:
      dtype: of parameters, activations and cache.
      rounds: timed turns of every part, after one that compiles.
      decode_steps: length of a decoding loop, at most the scenario's output.
      seed: of parameters and hidden states.
      progress: called with done and all turns.
      clock: gives seconds; of the process' own work (`time.process_time`) where others use the machine too.
    """

    dtype: Any = jnp.float32
    rounds: int = 7
    decode_steps: int = 64
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        for name in ("rounds", "decode_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least 1")

    @property
    def name(self) -> str:
        return "measured"

    def device(self, scenario: Scenario) -> str:
        return device_identity()["device"]

    def times(
        self,
        config: ModelConfig,
        scenario: Scenario,
        form: Form,
        counts: Sequence[int],
        windows: Sequence[int | None],
    ) -> Times:
        """See `provider.Provider`; weights are of `dtype` whatever the form.

        Raises `ConfigError` for a scenario of several devices or of other hardware.
        """
        if scenario.devices != 1 or scenario.hardware != "local":
            raise ConfigError(
                f"scenario {scenario.name!r} asks for {scenario.devices} x {scenario.hardware}, but measured "
                "costs are of one local device; take the roofline for others"
            )
        parts: dict[tuple[str, Any, str], _Part] = {}
        steps = min(self.decode_steps, scenario.output_tokens)
        maker = _Maker(SubBlocks(config, scenario), self.dtype, steps, self.seed)
        for window in windows:
            parts["attention", window, "prefill"] = maker.prefill_attention(window)
            parts["attention", window, "decode"] = maker.decode_attention(window)
        for count in counts:
            parts["experts", count, "prefill"] = maker.prefill_experts(count)
            parts["experts", count, "decode"] = maker.decode_experts(count)
        parts["fixed", None, "prefill"] = maker.prefill_fixed()
        parts["fixed", None, "decode"] = maker.decode_fixed()
        seconds = self._take_turns(parts)

        def both(kind: str, value: Any) -> Seconds:
            prefill, decode = seconds[kind, value, "prefill"], seconds[kind, value, "decode"]
            return Seconds(_median(prefill), _median(decode), _spread(prefill), _spread(decode))

        return Times(
            experts={count: both("experts", count) for count in counts},
            attention={window: both("attention", window) for window in windows},
            fixed=both("fixed", None),
        )

    def _take_turns(self, parts: dict[Any, _Part]) -> dict[Any, list[float]]:
        """Seconds per step of every part, one per round; each part's first turn compiles, uncounted."""
        states = {key: part.state for key, part in parts.items()}
        seconds: dict[Any, list[float]] = {key: [] for key in parts}
        for turn in range((self.rounds + 1) * len(parts)):
            key = list(parts)[turn % len(parts)]
            start = self.clock()
            states[key] = jax.block_until_ready(parts[key].run(states[key]))
            if turn >= len(parts):
                seconds[key].append((self.clock() - start) / parts[key].steps)
            if self.progress:
                self.progress(turn + 1, (self.rounds + 1) * len(parts))
        return seconds


@dataclass(frozen=True)
class _Maker:
    """Builds the parts of one scenario."""

    blocks: SubBlocks
    dtype: Any
    steps: int
    seed: int

    made: dict[int, Params] = field(default_factory=dict)

    def _params(self, config: ModelConfig) -> Params:
        """Random parameters of a one-layer model, shared by prefill and decoding.

        Drawn with numpy: jax.random would compile a program for each of many shapes, which takes longer than timing.
        """
        num_experts = config.blocks[0].num_experts
        if num_experts not in self.made:
            source = np.random.default_rng(self.seed)
            self.made[num_experts] = jax.tree.map(
                lambda spec: self._array(source, spec.shape, spec.fan_in**-0.5), param_specs(config), is_leaf=is_spec
            )
        return self.made[num_experts]

    def _array(self, source: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
        return jnp.asarray(source.standard_normal(shape, np.float32) * np.float32(scale)).astype(self.dtype)

    def _hidden(self, *shape: int) -> Array:
        """Random hidden states [*shape, hidden]."""
        return self._array(np.random.default_rng(self.seed + 1), (*shape, self.blocks.config.hidden_size), 1.0)

    def prefill_attention(self, window: int | None) -> _Part:
        """All chunks of one group's prompts."""
        blocks, config = self.blocks, self.blocks.with_window(window)
        rows, chunk, chunks = blocks.rows, blocks.chunk, blocks.chunks
        params, attend = self._params(config)["layers"][0]["attention"], blocks.prefill_attention(window)
        lengths = jnp.full(rows, blocks.scenario.input_tokens, jnp.int32)

        @jax.jit
        def run(params: Params, x: Array) -> Any:
            def one_chunk(index: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
                total, cache = state
                part = jax.lax.dynamic_slice_in_dim(x, index * chunk, chunk, 1)
                out, cache = attend(params, part, cache, index * chunk, lengths)
                return total + out, cache

            cache = init_cache(config, 0, rows, blocks.context, self.dtype)
            return jax.lax.fori_loop(0, chunks, one_chunk, (jnp.zeros_like(x[:, :chunk]), cache))

        return _repeated(run, params, self._hidden(rows, chunks * chunk), 1 / blocks.groups)

    def prefill_experts(self, count: int) -> _Part:
        """One chunk of one group's prompts."""
        blocks, config = self.blocks, self.blocks.one_layer(BlockConfig(count))
        params = self._params(config)["layers"][0]["moe"]
        run = jax.jit(lambda params, x: moe_block(params, config, x)[0])
        return _repeated(run, params, self._hidden(blocks.rows, blocks.chunk), 1 / (blocks.groups * blocks.chunks))

    def prefill_fixed(self) -> _Part:
        config = self.blocks.one_layer()
        shape = (self.blocks.batch, self.blocks.scenario.input_tokens)
        tokens = jnp.asarray(np.random.default_rng(self.seed).integers(config.vocab_size, size=shape, dtype=np.int32))
        return _repeated(jax.jit(self.blocks.prefill_rest), without_layers(self._params(config)), tokens)

    def decode_attention(self, window: int | None) -> _Part:
        config, scenario, steps = self.blocks.with_window(window), self.blocks.scenario, self.steps
        params, attend = self._params(config)["layers"][0]["attention"], self.blocks.decode_attention(window)
        cache = init_cache(config, 0, self.blocks.batch, self.blocks.context, self.dtype)

        def step(params: Params, index: Array, x: Array, cache: Any) -> tuple[Array, Any]:
            # Steps spread over the output positions where there are fewer of them.
            return attend(params, x, cache, scenario.input_tokens + index * scenario.output_tokens // steps)

        return self._loop(step, params, cache)

    def decode_experts(self, count: int) -> _Part:
        config = self.blocks.one_layer(BlockConfig(count))

        def step(params: Params, index: Array, x: Array, nothing: Any) -> tuple[Array, Any]:
            return moe_block(params, config, x)[0], nothing

        return self._loop(step, self._params(config)["layers"][0]["moe"], ())

    def decode_fixed(self) -> _Part:
        def step(params: Params, index: Array, x: Array, nothing: Any) -> tuple[Array, Any]:
            return self.blocks.decode_rest(params, x), nothing

        return self._loop(step, without_layers(self._params(self.blocks.one_layer())), ())

    def _loop(self, step: Callable[..., tuple[Array, Any]], params: Params, carry: Any) -> _Part:
        """`steps` steps on the device; each starts from its own hidden state and needs the one before it."""
        states = self._hidden(_STATES, self.blocks.batch, 1)

        @partial(jax.jit, donate_argnums=2)  # the cache is updated in place, as in generation
        def run(params: Params, states: Array, carry: Any) -> Any:
            def body(index: Array, state: tuple[Array, Any]) -> tuple[Array, Any]:
                x, carry = state
                fresh = states[index % _STATES]
                return step(params, index, fresh + x * jnp.asarray(1e-20, x.dtype), carry)

            return jax.lax.fori_loop(0, self.steps, body, (states[0], carry))

        # All outputs are waited for: of a carry that is empty there would be nothing to wait for.
        return _Part(lambda carry: jax.block_until_ready(run(params, states, carry))[1], carry, float(self.steps))


def device_identity() -> dict[str, Any]:
    """What measured seconds depend on besides shapes: part of a stage's settings, so that they are taken anew
    elsewhere.
    """
    device = jax.devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{_processor()}, {os.cpu_count()} cores"
    return {"device": kind, "platform": device.platform, "jax": jax.__version__}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _repeated(run: Callable[[Params, Array], Any], params: Params, x: Array, steps: float = 1.0) -> _Part:
    """Timing of one call whose input stays; it does `steps` of the whole work."""

    def again(state: Array) -> Array:
        jax.block_until_ready(run(params, state))
        return state

    return _Part(again, x, steps)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _spread(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)
