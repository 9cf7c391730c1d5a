"""What a search needs on every device, found without weights and without accelerators; see `plan.programs`.

    load    the checkpoint's parameters and the dense ones that come of them
    trace   the parent answers: slots for its longest answers, and the programs of generation
    rank    one layer, with its sums, on a batch of the longest traces
    lens    the same with the lens's sums, and alternatives of one layer through it
    score   alternatives that run together through the layers above theirs

Evaluation asks as `trace` does. What programs are given follows from shapes alone; what is there beside them between
two programs, hidden states above all, is counted as `search.score.replace_one` holds it.

Left out: measured costs, which are of one device and small trials; whole children on traces, which need less than
scoring; calibration of the child's cache, which runs a batch through all layers in one program; the host's memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate.abstract import AbstractEngine, without_values
from puzzle_jax.generate.batches import MicroBatch, longest_batch
from puzzle_jax.generate.engine import own_context, slot_context
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.sharding import batch_sharding, make_mesh, on_mesh, params_sharding
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import one_layer
from puzzle_jax.plan.programs import (
    DTYPE,
    bytes_beside,
    check_packed,
    device_bytes,
    in_place,
    kernel_shapes,
    zero_params,
)
from puzzle_jax.search.rank import ranking as rank
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.score import lens
from puzzle_jax.search.score import replace_one as replace

LOAD, TRACE, RANK, LENS, SCORE = STAGES = ("load", "trace", "rank", "lens", "score")


@dataclass(frozen=True)
class PlannedSearch:
    """A search, as far as memory depends on it.

    Attributes:
      config: of the parent.
      recipe: all settings; files that it names are not read.
      packed: whether the parent's experts are stored as MXFP4.
      prompt_tokens: of the longest prompt.

    Raises ConfigError for traces beyond the model's context, and experts that cannot be packed.
    """

    config: ModelConfig
    recipe: Recipe
    packed: bool = True
    prompt_tokens: int = 1024

    def __post_init__(self) -> None:
        if not self.recipe.traces.max_tokens:
            raise ConfigError("traces.max_tokens is empty, but the plan needs how long the parent's answers may become")
        if self.prompt_tokens < 1:
            raise ConfigError(f"prompt_tokens is {self.prompt_tokens}, but must be at least 1")
        if self.longest > self.config.max_position:
            raise ConfigError(
                f"prompts of {self.prompt_tokens} tokens and answers of {self.longest - self.prompt_tokens} are "
                f"longer than the model's context of {self.config.max_position}"
            )
        if self.packed:
            check_packed(self.config)

    @property
    def longest(self) -> int:
        """Tokens of the longest trace."""
        return self.prompt_tokens + max(self.recipe.traces.max_tokens.values())

    @cached_property
    def mesh(self) -> Mesh | None:
        """Raises ConfigError where JAX has fewer devices."""
        mesh = self.recipe.mesh
        return make_mesh(mesh.data, mesh.model) if mesh.devices > 1 else None

    @cached_property
    def params(self) -> Params:
        """Dense parameters, without values, in place."""
        return self._in_place(packed=False)

    @cached_property
    def loaded(self) -> Params:
        """Parameters as the checkpoint has them; packed experts as `StackedMXFP4`."""
        return self._in_place(packed=self.packed)

    def engine(self) -> AbstractEngine:
        """What answers the tasks."""
        context = slot_context(own_context(self.longest, self.config))
        return AbstractEngine(self.config, self.recipe.traces.batch_size, context, CacheFormat(), self.mesh)

    def batch(self, **tokens_per_batch: int) -> MicroBatch:
        """The batch of the longest traces, without values."""
        rows, length = longest_batch(self.longest, **tokens_per_batch)

        def array(dtype: Any, *shape: int, sharding: NamedSharding | None = None) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        spread = None if self._parts(rows) == 1 else batch_sharding(self.mesh)  # type: ignore[arg-type]
        values = (
            array(jnp.int32, rows, length, sharding=spread),
            array(jnp.bool_, rows, length),
            array(jnp.float32, rows, length),
            array(jnp.int32, rows),
            array(jnp.int32, rows),
            array(jnp.float32, rows),
        )
        # Through a tree, since annotations ask for arrays.
        return jax.tree.unflatten(jax.tree.structure(MicroBatch(*[0] * 6)), values)  # type: ignore[arg-type]

    def states(self, batch: MicroBatch, slots: int | None = None) -> jax.ShapeDtypeStruct:
        """Hidden states of a batch, or of so many alternatives of each of its rows."""
        rows, length = batch.tokens.shape
        shape = (rows, length) if slots is None else (rows, slots, length)
        sharding = None
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, PartitionSpec("data" if self._parts(rows) > 1 else None))
        return jax.ShapeDtypeStruct((*shape, self.config.hidden_size), DTYPE, sharding=sharding)

    def _parts(self, rows: int) -> int:
        """Devices that a batch's rows are dealt to."""
        data = self.recipe.mesh.data
        return data if rows % data == 0 else 1

    def _in_place(self, packed: bool) -> Params:
        def zeros() -> Params:
            return jax.tree.map(
                without_values, zero_params(self.config, packed), is_leaf=lambda node: isinstance(node, MXFP4)
            )

        shapes = jax.eval_shape(zeros)
        if self.mesh is None:
            return shapes

        def place(sharding: NamedSharding, part: Any) -> Any:
            return in_place(part, jax.tree.map(lambda _: sharding, part))

        return jax.tree.map(place, params_sharding(self.config, self.mesh), shapes)


@dataclass(frozen=True)
class StageMemory:
    """Bytes on one device in a stage; 0 for what it does not hold.

    Attributes:
      loaded: parameters as the checkpoint has them.
      weights: dense ones.
      caches, slots, group: of all requests, their logits and tokens, and of the rows whose prompts are run.
      batch: of traces.
      states: hidden states that are there between programs.
      sums: over batches.
      temporaries: what XLA allots beside, in the program that needs most.
    """

    loaded: int = 0
    weights: int = 0
    caches: int = 0
    slots: int = 0
    group: int = 0
    batch: int = 0
    states: int = 0
    sums: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, each.name) for each in fields(self))

    def to_json(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def plan_search(run: PlannedSearch) -> dict[str, StageMemory]:
    """Compiles the stages' programs for virtual devices; stages in order.

    Raises ConfigError where JAX has fewer devices than the mesh.
    """
    plans = {LOAD: _load, TRACE: _trace, RANK: _rank, LENS: _lens, SCORE: _score}
    return {stage: plan(run) for stage, plan in plans.items()}


# Stages ---------------------------------------------------------------------------------------------------------------


def _load(run: PlannedSearch) -> StageMemory:
    where = None if run.mesh is None else params_sharding(run.config, run.mesh)
    program = jax.jit(lambda loaded: to_compute(one_layer(loaded), DTYPE), out_shardings=where)
    weights = device_bytes(run.params)
    return StageMemory(
        loaded=device_bytes(run.loaded), weights=weights, temporaries=bytes_beside(program.lower(run.loaded)) - weights
    )


def _trace(run: PlannedSearch) -> StageMemory:
    engine = run.engine()
    state = engine.state()
    return StageMemory(
        weights=device_bytes(run.params),
        caches=device_bytes(state.caches),
        slots=device_bytes(state._replace(caches=[])),
        group=device_bytes(engine.group()),
        temporaries=max(map(bytes_beside, engine.lowered(run.params))),
    )


def _rank(run: PlannedSearch) -> StageMemory:
    config, batch = run.config, run.batch()
    x, sums = run.states(batch), jax.eval_shape(lambda: rank.no_sums(config))
    key = jax.eval_shape(lambda: jax.random.key(0))

    def program(window: int | None) -> Any:
        def layer(params: Params, x: Any, batch: MicroBatch, sums: Any, random: Any) -> Any:
            return rank.rank_layer.__wrapped__(params, config, window, x, batch, sums, random)  # type: ignore[attr-defined]

        return jax.jit(layer, donate_argnums=3).lower(run.params["layers"][0], x, batch, sums, key)

    with on_mesh(run.mesh), kernel_shapes():
        temporaries = max(bytes_beside(program(window)) for window in _windows(config))
    return StageMemory(
        weights=device_bytes(run.params),
        batch=device_bytes(batch),
        states=device_bytes(x),
        sums=config.num_layers * device_bytes(sums),
        temporaries=temporaries,
    )


def _lens(run: PlannedSearch) -> StageMemory:
    config, settings = run.config, run.recipe.score
    batch = run.batch(tokens_per_batch=settings.tokens_per_batch)
    answers, x, wave = _answers(batch), run.states(batch), run.states(batch, settings.per_call)
    square = jax.ShapeDtypeStruct((config.hidden_size,) * 2, jnp.float32)
    sums = jax.eval_shape(lambda: lens.LensSums.zeros(config.hidden_size))
    one, many = device_bytes(x), device_bytes(wave)
    with on_mesh(run.mesh), kernel_shapes():
        fit = bytes_beside(_own(lens.add_states, donate=0).lower(sums, x, x, answers))
        through = bytes_beside(_own(lens.through_lens).lower(square, x, x, wave))
        beside = {"fit": fit, "enter": many + _enter(run, batch), "through": many + through}
        beside["compare"] = 2 * many + _compare(run, x, wave, answers)
    return StageMemory(
        weights=device_bytes(run.params),
        batch=device_bytes(batch),
        states=(_kept_states(run) + 2) * one,  # the base's and the parent's after the layer
        sums=config.num_layers * (device_bytes(sums) + device_bytes(square)),
        temporaries=max(beside.values()),
    )


def _score(run: PlannedSearch) -> StageMemory:
    config, settings = run.config, run.recipe.score
    batch = run.batch(tokens_per_batch=settings.tokens_per_batch)
    x, wave = run.states(batch), run.states(batch, settings.per_call)
    one, many = device_bytes(x), device_bytes(wave)
    layer, mask = run.params["layers"][0], jax.ShapeDtypeStruct((config.blocks[0].num_experts,), jnp.bool_)

    def attention(window: int | None) -> int:
        program = _own(lambda params, x: replace.run_attention.__wrapped__(params, config, window, x))  # type: ignore[attr-defined]
        return bytes_beside(program.lower(layer["attention"], wave))

    def mixture() -> int:
        program = _own(lambda params, x, mask: replace.run_mixture.__wrapped__(params, config, x, mask))  # type: ignore[attr-defined]
        return bytes_beside(program.lower(layer["moe"], wave, mask))

    with on_mesh(run.mesh), kernel_shapes():
        beside = {
            # Two of the wave are there while a mixture runs: what came into the layer, and what attention made of it.
            "attention": many + max(map(attention, _windows(config))),
            "mixture": 2 * many + mixture(),
            "enter": many + _enter(run, batch),
            "compare": many + _compare(run, x, wave, _answers(batch)),
        }
    return StageMemory(
        weights=device_bytes(run.params),
        batch=device_bytes(batch),
        states=(_kept_states(run) + 1) * one,  # the parent's last
        temporaries=max(beside.values()),
    )


def _enter(run: PlannedSearch, batch: MicroBatch) -> int:
    slots, experts = run.recipe.score.per_call, run.config.blocks[0].num_experts
    masks, entry = (jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in ((slots, experts), (slots,)))

    def program(moe: Params, middle: Any, masks: Any, entry: Any, x: Any) -> Any:
        return replace.enter_mixture.__wrapped__(moe, run.config, middle, masks, entry, x)  # type: ignore[attr-defined]

    given = run.params["layers"][0]["moe"], run.states(batch), masks, entry, run.states(batch, slots)
    return bytes_beside(jax.jit(program).lower(*given))


def _compare(run: PlannedSearch, x: Any, wave: Any, answers: replace.Answers) -> int:
    head = {name: run.params[name] for name in ("final_norm", "head")}

    def program(head: Params, parent: Any, children: Any, answers: Any) -> Any:
        return replace.compare_states.__wrapped__(head, run.config, parent, children, answers)  # type: ignore[attr-defined]

    return bytes_beside(jax.jit(program).lower(head, x, wave, answers))


def _own(program: Any, donate: int | None = None) -> Any:
    """A jitted function of its own, so that no program traced before or later is taken for it."""
    inner = getattr(program, "__wrapped__", program)
    return jax.jit(lambda *given: inner(*given), donate_argnums=() if donate is None else donate)


def _kept_states(run: PlannedSearch) -> int:
    """Hidden states of the base while a part of it is worked on: the kept ones below, and two of each of its layers."""
    layers, every = run.config.num_layers, run.recipe.score.keep_every
    parts = range(math.ceil(layers / every))
    return max(below + 2 * min(every, layers - below * every) for below in parts)


def _answers(batch: MicroBatch) -> replace.Answers:
    """Of a batch most of whose tokens are answers."""
    size = math.prod(batch.tokens.shape)
    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    weight = jax.ShapeDtypeStruct((size,), jnp.float32)
    return jax.tree.unflatten(jax.tree.structure(replace.Answers(*[0] * 4)), (index, index, weight, index))  # type: ignore[arg-type]


def _windows(config: ModelConfig) -> set[int | None]:
    """Of the parent's layers; narrower ones need less."""
    return {block.window for block in config.blocks}
