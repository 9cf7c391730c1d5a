"""Seconds of our own sub-blocks on a TPU that need not be present, from XLA's ahead-of-time compilation.

Each sub-block is compiled for one device of a TPU topology, at the exact shapes of a scenario, in bfloat16, and the
compiler's own analysis of the compiled program counts its operations and bytes:

    seconds of a program = max(operations / rate, bytes / bandwidth),   rate and bandwidth from `hardware`

Fusions, padding, copies and temporary arrays are therefore XLA's own, not those of a formula. What the analysis cannot
tell, and how it is handled (all observed with libtpu 0.0.42):

    loops            bodies count once, however often they run: chunks of a prompt are compiled one at a time, the first
                     one and one that sees a block of cached keys; every block costs the difference between the two
    experts          the mixture is one round of `kernels.expert_mlp.capacity`, in prefill too: a TPU compiles the
                     gathered weights of `sorted_blocks` to loops. Further rounds for the busiest expert are left out
    layouts          the compiler chooses those of arguments; in the default layout it copies all weights of large
                     mixtures
    on-chip memory   copies into it and within it count as bytes: weights of gpt-oss-120b count 1.04 times, but 16 MB of
                     weights, which fit there, eight times; figures for small models are meaningless
    optimal_seconds  this entry of the analysis is not used: each instruction unknown to it lowers it by a second

Left out: several devices, FP8 caches, experts in MXFP4, Pallas kernels, launches, and whatever keeps a real device
from its peaks. The figures compare alternatives on one device; they do not predict its wall-clock time.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding
from jaxtyping import PyTree

from puzzle_jax.config import BlockConfig, ModelConfig, cache_slots
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.hardware import Hardware, hardware_named
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.costs.sub_blocks import Hidden, SubBlocks, without_layers
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.chunk_attention.blocks import key_block
from puzzle_jax.kernels.expert_mlp import capacity, combine
from puzzle_jax.model.cache import LayerCache, init_cache
from puzzle_jax.model.network import rms_norm, route_tokens
from puzzle_jax.model.spec import Params, is_spec, layer_experts, param_specs

Device: TypeAlias = Any  # type checkers do not accept `jax.Device` as a type

TOPOLOGIES = {"tpu-v5e": "v5e:2x2", "tpu-v5p": "v5p:2x2x1", "tpu-v6e": "v6e:2x2"}
"""The smallest topology with a device of each kind, by the names of `hardware`."""


def tpu_device(hardware: str) -> Device:
    """Returns a device to compile for, which need not be present.

    Raises `ConfigError` for hardware that is not a known TPU, and if the compiler does not start: only one process per
    machine can use it at a time.
    """
    if hardware not in TOPOLOGIES:
        raise ConfigError(f"hardware is {hardware!r}, but xla costs are of {', '.join(TOPOLOGIES)}")
    try:
        return topologies.get_topology_desc(TOPOLOGIES[hardware], platform="tpu").devices[0]
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"the compiler for {hardware} does not start: {str(error).splitlines()[0]}") from error


@dataclass(frozen=True)
class Work:
    """Operations and bytes that XLA counts in a compiled program."""

    flops: float
    num_bytes: float

    @staticmethod
    def of(compiled: jax.stages.Compiled) -> Work:
        """The work of a compiled program."""
        counted = compiled.cost_analysis()
        assert counted is not None
        return Work(counted["flops"], counted["bytes accessed"])

    def with_more(self, further: Work, times: int) -> Work:
        """This work plus `times` times what `further` has in excess of it."""
        flops, num_bytes = further.flops - self.flops, further.num_bytes - self.num_bytes
        return Work(self.flops + times * max(0.0, flops), self.num_bytes + times * max(0.0, num_bytes))

    def seconds(self, hardware: Hardware) -> float:
        return max(self.flops / hardware.flops_per_second, self.num_bytes / hardware.bytes_per_second)


@dataclass(frozen=True)
class Xla:
    """A `provider.Provider` that compiles for the TPU that a scenario names, as `device_of` returns it for that name.

    `hardware` replaces the rates of the scenario's hardware, which turn counts into seconds; `progress` is called with
    the numbers of finished and of all sub-blocks.

    Raises `ConfigError` if XLA's compiler for TPUs is not installed.
    """

    device_of: Callable[[str], Device] = tpu_device
    hardware: Hardware | None = None
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        if self.device_of is tpu_device and importlib.util.find_spec("libtpu") is None:
            raise ConfigError("xla costs need XLA's compiler for TPUs: pip install 'jax[tpu]'; a TPU is not needed")

    @property
    def name(self) -> str:
        return "xla"

    def device(self, scenario: Scenario) -> str:
        return scenario.hardware

    def times(
        self,
        config: ModelConfig,
        scenario: Scenario,
        form: Form,
        counts: Sequence[int],
        windows: Sequence[int | None],
    ) -> Times:
        """See `provider.Provider`; weights are bfloat16 whatever the form.

        Raises `ConfigError` for several devices, a cache that is not bfloat16, hardware that is not a known TPU, and a
        sub-block that does not fit into the device's memory.
        """
        if scenario.devices != 1 or scenario.kv_bytes_per_value != 2:
            raise ConfigError(
                f"scenario {scenario.name!r} asks for {scenario.devices} devices and {scenario.kv_bytes_per_value} "
                "bytes per cached value, but xla costs are of 1 device and 2 bytes (bfloat16)"
            )
        hardware = self.hardware or hardware_named(scenario.hardware)
        programs = _Programs(SubBlocks(config, scenario), self.device_of(scenario.hardware), hardware)
        parts, done = len(windows) + len(counts) + 1, count_from(1)

        def counted(seconds: Seconds) -> Seconds:
            if self.progress:
                self.progress(next(done), parts)
            return seconds

        return Times(
            experts={count: counted(programs.experts(count)) for count in counts},
            attention={window: counted(programs.attention(window)) for window in windows},
            fixed=counted(programs.rest()),
        )


@dataclass(frozen=True)
class _Programs:
    """Compiles the sub-blocks of one scenario for one device."""

    blocks: SubBlocks
    device: Device
    hardware: Hardware

    def attention(self, window: int | None) -> Seconds:
        blocks, config = self.blocks, self.blocks.with_window(window)
        params = self._params(config)["layers"][0]["attention"]

        def cache(rows: int) -> LayerCache:
            return jax.eval_shape(lambda: init_cache(config, 0, rows, blocks.context, jnp.bfloat16))

        def prefill(start: int) -> Work:
            run = blocks.prefill_attention(window)
            lengths = jax.ShapeDtypeStruct((blocks.rows,), jnp.int32)
            return self._work(
                f"prefill of attention with window {window}",
                lambda params, x, cache, lengths: run(params, x, cache, jnp.int32(start), lengths),
                params,
                self._hidden(blocks.rows, blocks.chunk),
                cache(blocks.rows),
                lengths,
                donated=2,
            )

        slots = cache_slots(window, blocks.context)
        cached = [-(-min(index * blocks.chunk, slots) // key_block(slots)) for index in range(blocks.chunks)]
        first = prefill(0)
        second = prefill(key_block(slots)) if any(cached) else first
        prompt_seconds = sum(first.with_more(second, further).seconds(self.hardware) for further in cached)
        step = self._work(
            f"decoding of attention with window {window}",
            blocks.decode_attention(window),
            params,
            self._hidden(blocks.batch, 1),
            cache(blocks.batch),
            jax.ShapeDtypeStruct((), jnp.int32),
            donated=2,
        )
        return Seconds(blocks.groups * prompt_seconds, step.seconds(self.hardware))

    def experts(self, count: int) -> Seconds:
        """The mixture, router included, in one round."""
        blocks, config = self.blocks, self.blocks.one_layer(BlockConfig(count))
        params = self._params(config)["layers"][0]["moe"]

        def mixture(params: Params, x: Hidden) -> Hidden:
            y = rms_norm(x, params["norm"], config.rms_norm_eps)
            routing = route_tokens(params, config, y).routing
            tokens = y.reshape(-1, y.shape[-1])
            outputs = capacity.outputs_in_rounds(
                (config.swiglu_limit, config.blocks[0].num_experts), tokens, routing.ids, layer_experts(params)
            )
            return x + combine(outputs, routing.gates).reshape(x.shape)

        chunk = self._work(f"prefill of {count} experts", mixture, params, self._hidden(blocks.rows, blocks.chunk))
        step = self._work(f"decoding of {count} experts", mixture, params, self._hidden(blocks.batch, 1))
        chunks = blocks.groups * blocks.chunks
        return Seconds(chunks * chunk.seconds(self.hardware), step.seconds(self.hardware))

    def rest(self) -> Seconds:
        """Embedding, head, and the choice of the next token."""
        blocks, params = self.blocks, without_layers(self._params(self.blocks.one_layer()))
        prompts = jax.ShapeDtypeStruct((blocks.batch, blocks.scenario.input_tokens), jnp.int32)
        prefill = self._work("prefill of embedding and head", blocks.prefill_rest, params, prompts)
        step = self._work("decoding of embedding and head", blocks.decode_rest, params, self._hidden(blocks.batch, 1))
        return Seconds(prefill.seconds(self.hardware), step.seconds(self.hardware))

    def _params(self, config: ModelConfig) -> Params:
        return jax.tree.map(
            lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), param_specs(config), is_leaf=is_spec
        )

    def _hidden(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, self.blocks.config.hidden_size), jnp.bfloat16)

    def _work(self, what: str, function: Callable[..., PyTree], *shapes: PyTree, donated: int | None = None) -> Work:
        """Compiles a function for arguments of these shapes and returns its work."""
        free = Format(Layout.AUTO, SingleDeviceSharding(self.device))
        program = jax.jit(function, in_shardings=free, out_shardings=free, donate_argnums=donated)
        try:
            with warnings.catch_warnings():
                # JAX's persistent compilation cache stores these too, but cannot read them back without a device.
                warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
                return Work.of(program.lower(*shapes).compile())
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{what} does not compile for {self.blocks.scenario.hardware}: {reason}") from error
