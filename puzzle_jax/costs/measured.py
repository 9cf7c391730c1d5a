"""Seconds of our own sub-blocks on the device present, at the exact shapes of a scenario.

Sub-blocks are timed where they will run: in whole models with random parameters. The reference has the most experts and
the widest window in all of its layers. For every other expert count and window, a trial has it in all layers and
alternates with the reference, so that drift of the machine affects both alike:

    seconds(sub-block) = seconds(the reference's) + (median over rounds of trial / reference - 1) * reference / layers

A sub-block timed alone in a loop finds its weights and caches in the processor's cache, from which a whole model would
have evicted them: sums of such times promised up to twice the speed that the models had. They only decide how the
reference's seconds are split among attention, experts and the rest. Prefill runs as in the generation engine, in chunks
of a group of rows; decoding is an on-device loop of many steps over the positions of an answer.

Left out: several devices, and routing as uneven as a trained router's. If the memory for trials holds fewer layers than
the model has, the others are taken to cost the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from math import inf, prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from puzzle_jax.config import BlockConfig, ModelConfig, cache_bytes
from puzzle_jax.convert_hf.table import Form
from puzzle_jax.costs.hardware import device_identity
from puzzle_jax.costs.provider import Seconds, Times
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.costs.sub_blocks import SubBlocks, without_layers
from puzzle_jax.errors import ConfigError, check_range
from puzzle_jax.generate.slots import Admission, Group, Slots, admit, empty_group, empty_slots, prefill
from puzzle_jax.model.cache import LayerCache, decode_step, init_cache
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.network import moe_block
from puzzle_jax.model.spec import Params, is_spec, param_specs
from puzzle_jax.numeric import median_error

# Most bytes of parameters and caches in one trial.
_TRIAL_BYTES = 4e9
# Number of hidden states from which the steps of a part's own decoding loop start in turn: if each step started from
# the last one's output, routing would settle on few experts.
_STATES = 8

SETTLED, MOST_REPEATS = 0.01, 2
"""Relative standard error of a ratio that is small enough, and the most repetitions of all rounds to reach it."""

Kind = tuple[str, int | None]
"""("experts", count), ("attention", window) or ("fixed", None)."""


class _Part(NamedTuple):
    """Something to time: `run` maps a state to the next; `steps` is what its seconds are divided by.

    `steps` is below 1 if one run does part of a step: a group of rows is part of a batch.
    """

    run: Callable[[PyTree], PyTree]
    state: PyTree
    steps: float


@dataclass(frozen=True)
class Measured:
    """A `provider.Provider` that times the default device.

    Attributes:
      dtype: data type of parameters, activations and cache.
      rounds: timed turns of every model, after one that compiles; up to three times as many if they disagree.
      decode_steps: steps of a decoding loop, at most the scenario's output tokens.
      seed: seed of parameters and hidden states.
      progress: called with the numbers of finished and of all turns.
      clock: returns seconds; `time.process_time` counts only this process's work, for a machine that others use too.
    """

    dtype: np.dtype | type = jnp.float32
    rounds: int = 7
    decode_steps: int = 64
    seed: int = 0
    progress: Callable[[int, int], None] | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        for name in ("rounds", "decode_steps"):
            check_range(name, getattr(self, name), 1)

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
        """See `provider.Provider`; weights have `dtype` whatever the form.

        Raises `ConfigError` for a scenario with several devices or hardware other than "local".
        """
        if scenario.devices != 1 or scenario.hardware != "local":
            raise ConfigError(
                f"scenario {scenario.name!r} asks for {scenario.devices} x {scenario.hardware}, but measured "
                "costs are of one local device; take the roofline for others"
            )
        steps = min(self.decode_steps, scenario.output_tokens)
        maker = _Maker(SubBlocks(config, scenario), self.dtype, steps, self.seed)
        widest = max(windows, key=lambda window: inf if window is None else window)
        reference = BlockConfig(max(counts), widest)
        kinds: dict[Kind, BlockConfig] = {("experts", c): replace(reference, num_experts=c) for c in counts}
        kinds |= {("attention", w): replace(reference, window=w) for w in windows}
        others = {kind: block for kind, block in kinds.items() if block != reference}
        turns = 2 * (self.rounds + 1) * (3 + 2 * max(1, len(others)))
        done = count(1)

        def advance() -> None:
            if self.progress is not None:
                self.progress(next(done), turns)

        def timed(phase: str) -> dict[Kind, tuple[float, float]]:
            """Seconds of every sub-block and of the rest in prefill or decoding, and their errors."""
            alone = self._alone(maker, phase, reference, advance)
            races = {
                kind: self._race(maker, phase, reference, block, advance)
                for kind, block in (others or {("experts", reference.num_experts): reference}).items()
            }
            of_model = statistics.median(seconds for race in races.values() for seconds, _ in race)
            share = of_model / (alone["fixed", None] + maker.depth * (sum(alone.values()) - alone["fixed", None]))
            found: dict[Kind, tuple[float, float]] = {("fixed", None): (alone["fixed", None] * share, 0.0)}
            for kind in kinds:
                own = alone[kind[0], getattr(reference, _FIELDS[kind[0]])] * share
                ratios = [other / seconds for seconds, other in races[kind]] if kind in others else [1.0]
                change = (statistics.median(ratios) - 1) * of_model / maker.depth
                found[kind] = (max(0.0, own + change), median_error(ratios))
            return found

        prefill, decode = timed("prefill"), timed("decode")

        def both(name: str, alternative: int | None = None) -> Seconds:
            prefilling, decoding = prefill[name, alternative], decode[name, alternative]
            return Seconds(prefilling[0], decoding[0], prefilling[1], decoding[1])

        return Times(
            experts={count: both("experts", count) for count in counts},
            attention={window: both("attention", window) for window in windows},
            fixed=both("fixed"),
        )

    def _alone(
        self, maker: _Maker, phase: str, reference: BlockConfig, advance: Callable[[], None]
    ) -> dict[Kind, float]:
        """Seconds of the reference's sub-blocks and of the rest, each timed alone."""
        parts = {
            ("fixed", None): getattr(maker, f"{phase}_fixed")(),
            ("attention", reference.window): getattr(maker, f"{phase}_attention")(reference.window),
            ("experts", reference.num_experts): getattr(maker, f"{phase}_experts")(reference.num_experts),
        }
        return {kind: statistics.median(self._timed([part], advance)[0]) for kind, part in parts.items()}

    def _race(
        self, maker: _Maker, phase: str, reference: BlockConfig, block: BlockConfig, advance: Callable[[], None]
    ) -> list[tuple[float, float]]:
        """Seconds of the reference and of a trial, round by round."""
        parts = [getattr(maker, f"{phase}_model")(each) for each in (reference, block)]
        return list(zip(*self._timed(parts, advance), strict=True))

    def _timed(self, parts: Sequence[_Part], advance: Callable[[], None]) -> list[list[float]]:
        """Seconds per step of every part, one value per round, the parts taking turns; the first turn of each compiles
        and is not counted. While the last part's time relative to the first one's is uncertain, as many more follow."""
        states = [part.state for part in parts]
        seconds: list[list[float]] = [[] for _ in parts]
        for turn in range((1 + MOST_REPEATS) * self.rounds + 1):
            if turn > 1 and (turn - 1) % self.rounds == 0 and _settled(seconds):
                break
            for number, part in list(enumerate(parts))[:: 1 if turn % 2 else -1]:
                start = self.clock()
                states[number] = jax.block_until_ready(part.run(states[number]))
                if turn:
                    seconds[number].append((self.clock() - start) / part.steps)
                if turn <= self.rounds:
                    advance()
        return seconds


def _settled(seconds: Sequence[Sequence[float]]) -> bool:
    """Returns whether the ratio of the last part's seconds to the first one's is known precisely enough."""
    return median_error([last / first for first, last in zip(seconds[0], seconds[-1], strict=True)]) <= SETTLED


_FIELDS = {"experts": "num_experts", "attention": "window"}


@dataclass(frozen=True)
class _Maker:
    """Builds the parts of one scenario."""

    blocks: SubBlocks
    dtype: np.dtype | type
    steps: int
    seed: int
    made: dict[tuple[int, int], Params] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Layers of a trial: the model's, or as many as `_TRIAL_BYTES` hold."""
        config = self.blocks.config
        config = replace(config, blocks=(BlockConfig(max(block.num_experts for block in config.blocks)),))
        layer = jax.tree.leaves(param_specs(config)["layers"], is_leaf=is_spec)
        size = jnp.dtype(self.dtype).itemsize
        caches = self.blocks.batch * cache_bytes(config, self.blocks.context, size)
        bytes_of_layer = size * sum(prod(spec.shape) for spec in layer) + caches
        return max(1, min(self.blocks.config.num_layers, int(_TRIAL_BYTES // bytes_of_layer)))

    def _params(self, config: ModelConfig) -> Params:
        """Random parameters, shared by prefill and decoding; besides the reference's, only one model's are kept.

        They are drawn with numpy: jax.random would compile a program for each of many shapes, which takes longer than
        timing.
        """
        key = (config.num_layers, config.blocks[0].num_experts)
        if key not in self.made:
            most = max(self.made, default=key)
            for old in [known for known in self.made if known[0] == key[0] and known != most]:
                del self.made[old]
            source = np.random.default_rng(self.seed)
            self.made[key] = jax.tree.map(
                lambda spec: self._array(source, spec.shape, spec.fan_in**-0.5), param_specs(config), is_leaf=is_spec
            )
        return self.made[key]

    def _array(self, source: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
        return jnp.asarray(source.standard_normal(shape, np.float32) * np.float32(scale)).astype(self.dtype)

    def _hidden(self, *shape: int) -> Array:
        """Random hidden states [*shape, hidden]."""
        return self._array(np.random.default_rng(self.seed + 1), (*shape, self.blocks.config.hidden_size), 1.0)

    def _model(self, block: BlockConfig) -> ModelConfig:
        return replace(self.blocks.config, blocks=(block,) * self.depth)

    def _tokens(self, *shape: int) -> Array:
        tokens = np.random.default_rng(self.seed).integers(self.blocks.config.vocab_size, size=shape, dtype=np.int32)
        return jnp.asarray(tokens)

    def prefill_model(self, block: BlockConfig) -> _Part:
        """Prefill of one group's prompts in a model of such layers, and their admission to the slots."""
        blocks, config, form = self.blocks, self._model(block), CacheFormat()
        params, rows, chunk = self._params(config), blocks.rows, blocks.chunk
        tokens = self._tokens(rows, blocks.chunks * chunk)
        lengths = jnp.full(rows, blocks.scenario.input_tokens, jnp.int32)
        each = jnp.arange(rows, dtype=jnp.int32)
        admission = Admission(jnp.int32(rows), each, each, lengths, lengths, lengths)

        def run(state: tuple[Group, Slots]) -> tuple[Group, Slots]:
            group, slots = state
            for start in range(0, tokens.shape[1], chunk):
                part = tokens[:, start : start + chunk]
                group = prefill(params, config, group, part, jnp.int32(start), lengths, blocks.context, None)
            return group, admit(params, config, slots, group, admission)

        dtype = jnp.dtype(self.dtype)
        group = empty_group(config, rows, blocks.context, dtype, form, experts=False)
        slots = empty_slots(config, blocks.batch, blocks.context, dtype, form, log_probs=False, experts=False)
        return _Part(run, (group, slots), 1 / blocks.groups)

    def decode_model(self, block: BlockConfig) -> _Part:
        """A loop of decoding steps of the whole batch in a model of such layers, each on tokens drawn beforehand."""
        blocks, config = self.blocks, self._model(block)
        params, tokens = self._params(config), self._tokens(self.steps, blocks.batch)
        caches = [init_cache(config, layer, blocks.batch, blocks.context, self.dtype) for layer in range(self.depth)]
        scenario = (blocks.scenario.input_tokens, blocks.scenario.output_tokens)

        def run(caches: PyTree) -> PyTree:
            return jax.block_until_ready(_decode_loop(params, config, scenario, tokens, caches))[1]

        return _Part(run, caches, float(self.steps))

    def prefill_attention(self, window: int | None) -> _Part:
        """All chunks of one group's prompts."""
        blocks, config = self.blocks, self.blocks.with_window(window)
        rows, chunk, chunks = blocks.rows, blocks.chunk, blocks.chunks
        params, attend = self._params(config)["layers"][0]["attention"], blocks.prefill_attention(window)
        lengths = jnp.full(rows, blocks.scenario.input_tokens, jnp.int32)

        @jax.jit
        def run(params: Params, x: Array) -> PyTree:
            def one_chunk(index: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
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
        tokens = self._tokens(self.blocks.batch, self.blocks.scenario.input_tokens)
        return _repeated(jax.jit(self.blocks.prefill_rest), without_layers(self._params(config)), tokens)

    def decode_attention(self, window: int | None) -> _Part:
        config, scenario, steps = self.blocks.with_window(window), self.blocks.scenario, self.steps
        params, attend = self._params(config)["layers"][0]["attention"], self.blocks.decode_attention(window)
        cache = init_cache(config, 0, self.blocks.batch, self.blocks.context, self.dtype)

        def step(params: Params, index: Array, x: Array, cache: LayerCache) -> tuple[Array, LayerCache]:
            # Fewer steps than output positions are spread over all of them.
            return attend(params, x, cache, scenario.input_tokens + index * scenario.output_tokens // steps)

        return self._loop(step, params, cache)

    def decode_experts(self, count: int) -> _Part:
        config = self.blocks.one_layer(BlockConfig(count))

        def step(params: Params, index: Array, x: Array, carry: PyTree) -> tuple[Array, PyTree]:
            return moe_block(params, config, x)[0], carry

        return self._loop(step, self._params(config)["layers"][0]["moe"], ())

    def decode_fixed(self) -> _Part:
        def step(params: Params, index: Array, x: Array, carry: PyTree) -> tuple[Array, PyTree]:
            return self.blocks.decode_rest(params, x), carry

        return self._loop(step, without_layers(self._params(self.blocks.one_layer())), ())

    def _loop(self, step: Callable[..., tuple[Array, PyTree]], params: Params, carry: PyTree) -> _Part:
        """`steps` steps on the device; each starts from its own hidden state and depends on the step before it."""
        states = self._hidden(_STATES, self.blocks.batch, 1)

        @partial(jax.jit, donate_argnums=2)  # the cache is updated in place, as in generation
        def run(params: Params, states: Array, carry: PyTree) -> PyTree:
            def body(index: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
                x, carry = state
                fresh = states[index % _STATES]
                return step(params, index, fresh + x * jnp.asarray(1e-20, x.dtype), carry)

            return jax.lax.fori_loop(0, self.steps, body, (states[0], carry))

        # Wait for all outputs: an empty carry would give nothing to wait for.
        return _Part(lambda carry: jax.block_until_ready(run(params, states, carry))[1], carry, float(self.steps))


@partial(jax.jit, static_argnums=(1, 2), donate_argnums=4)  # caches are updated in place, as in generation
def _decode_loop(
    params: Params, config: ModelConfig, scenario: tuple[int, int], tokens: Array, caches: PyTree
) -> tuple[Array, PyTree]:
    """Runs decoding steps, spread over the positions of an answer.

    Args:
      scenario: input and output tokens of a request.
      tokens: int32 [steps, batch], drawn beforehand.
    """
    (before, answer), (steps, batch) = scenario, tokens.shape

    def body(index: Array, state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
        chosen, caches = state
        positions = jnp.full(batch, before + index * answer // steps, jnp.int32)
        logits, caches, _ = decode_step(params, config, caches, tokens[index], positions)
        return chosen + jnp.argmax(logits, axis=-1).astype(jnp.int32), caches

    return jax.lax.fori_loop(0, steps, body, (jnp.zeros(batch, jnp.int32), caches))


def _repeated(run: Callable[[Params, Array], PyTree], params: Params, x: Array, steps: float = 1.0) -> _Part:
    """A part that repeats one call on the same input; each call does `steps` of the whole work."""

    def again(state: Array) -> Array:
        jax.block_until_ready(run(params, state))
        return state

    return _Part(again, x, steps)
