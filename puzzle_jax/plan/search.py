"""The memory that a search needs on every device, found without weights and without accelerators; see `plan.abstract`.

    load    the parameters, and the tensor that is being transposed or decoded
    trace   the parent answers: slots for its longest answers, and the programs of generation
    rank    one layer, with its sums, on a batch of the longest traces
    lens    the same with the lens's sums, and the alternatives of one layer passed through the lens
    score   alternatives that run together through the layers above theirs
    calibrate   the child on a batch of the longest traces, for the scales of its FP8 cache

Evaluation needs what `trace` does. The arguments of programs follow from shapes alone; arrays that are held between two
programs, hidden states above all, are counted as `search.score.replace_one` holds them.

Left out: training finalists; measuring costs, which is small trials on one device; running whole children on traces,
which needs less than scoring; host memory. Calibration runs all layers in one program, in which they use the same
memory in turn, so it is compiled with one layer for each of the parent's windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.generate import calibrate
from puzzle_jax.generate.batches import MicroBatch, longest_batch
from puzzle_jax.generate.engine import own_context, slot_context
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.network import to_compute
from puzzle_jax.model.sharding import batch_sharding, make_mesh, params_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, head_params
from puzzle_jax.model.stacked import one_layer
from puzzle_jax.model.weights import check_stored, stays_packed
from puzzle_jax.plan import abstract
from puzzle_jax.plan.abstract import device_bytes, in_place, program_bytes, zero_params
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.engine import AbstractEngine
from puzzle_jax.plan.record import Change, Usage
from puzzle_jax.search.rank import statistics as rank
from puzzle_jax.search.rank.rows import PackedTraces, batch_rows, row_length
from puzzle_jax.search.recipe import Recipe
from puzzle_jax.search.score import lens
from puzzle_jax.search.score import replace_one as score

LOAD, TRACE, RANK, LENS, SCORE, CALIBRATE = STAGES = ("load", "trace", "rank", "lens", "score", "calibrate")

_States = jax.ShapeDtypeStruct

_HELP = {
    TRACE: ("lower traces.batch_size or traces.max_tokens", "have the parent answer elsewhere (traces.file)"),
    RANK: ("shorter answers (traces.max_tokens)",),
    CALIBRATE: ("shorter answers (traces.max_tokens)",),
    LENS: (
        "lower score.per_call, score.keep_every or score.tokens_per_batch",
        "score.keep_sets 0, which needs no lens",
    ),
    SCORE: ("lower score.per_call, score.keep_every or score.tokens_per_batch",),
}


@dataclass(frozen=True)
class PlannedSearch:
    """A search of a parent, as far as memory depends on it.

    Attributes:
      recipe: all settings; files that it names are not read.
      stored_packed: whether the parent's experts are stored as MXFP4.
      prompt_tokens: length of the longest prompt.
      device_memory: bytes of a device, by which `weights: auto` chooses.

    Raises ConfigError for traces beyond the model's context, and experts that cannot be packed.
    """

    config: ModelConfig
    recipe: Recipe
    stored_packed: bool = True
    prompt_tokens: int = 1024
    device_memory: int = 80 * 10**9

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
        if self.stored_packed:
            abstract.check_packed(self.config)
        check_stored(self.recipe.weights, self.stored_packed)

    # What a plan is made of -------------------------------------------------------------------------------------------

    @property
    def about(self) -> list[str]:
        mesh, name = self.recipe.mesh, self.recipe.parent.name
        return [f"{name} on {mesh.data} x {mesh.model} devices, traces of up to {self.longest:,} tokens"]

    @property
    def programs(self) -> dict[str, Callable[[], Usage]]:
        plans = {LOAD: _load, TRACE: _trace, RANK: _rank, LENS: _lens, SCORE: _score, CALIBRATE: _calibrate}
        return {stage: partial(plan, self) for stage, plan in plans.items()}

    @property
    def labels(self) -> dict[str, str]:
        return {
            "weights": f"parameters, experts in {'MXFP4' if self.packed else 'bfloat16'}",
            **self.engine.labels,
            "batch": "batch of traces",
            "states": "hidden states kept",
            "sums": "sums over batches",
        }

    def changes(self, found: Mapping[str, Usage], program: str, limit: int) -> list[Change]:
        """Changes that help a stage; `plan.fitting` says which are enough together."""
        ways = _HELP.get(program, ()) if found[program].held["weights"] < limit else ()
        return [Change(what) for what in (*ways, "more devices (mesh.model)")]

    @property
    def notes(self) -> list[str]:
        config, model = self.config, self.recipe.mesh.model
        counts = {"experts": config.blocks[0].num_experts, "key-value heads": config.num_kv_heads}
        undivided = [(name, count) for name, count in counts.items() if count % model]
        finalists, left_out = self.recipe.finalists, []
        if finalists.count:
            left_out.append(
                "left out: finalists, which hold the parameters a second time, and what `puzzle plan distill` "
                f"counts for {finalists.rows} rows of {finalists.row_length:,} tokens"
            )
        alike = [f"every device holds all {name}: {model} do not divide {count}" for name, count in undivided]
        return [compiler().about, *alike, *left_out]

    # Arrays without values --------------------------------------------------------------------------------------------

    @property
    def longest(self) -> int:
        """Tokens of the longest trace."""
        return self.prompt_tokens + max(self.recipe.traces.max_tokens.values())

    @cached_property
    def mesh(self) -> Mesh | None:
        """The mesh; None for a single device of this process. Raises ConfigError where JAX has fewer devices."""
        mesh = self.recipe.mesh
        devices = compiler().devices(mesh.devices)
        return make_mesh(mesh.data, mesh.model, devices) if mesh.devices > 1 or devices else None

    @cached_property
    def packed(self) -> bool:
        """Returns whether experts are held packed."""
        return stays_packed(
            self.recipe.weights,
            self.config,
            self.stored_packed,
            dtype=compiler().dtype,
            mesh=self.mesh,
            memory=self.device_memory,
        )

    @cached_property
    def params(self) -> Params:
        """Parameters without values, sharded."""
        return abstract.layer_params(self.config, self.mesh, lambda: zero_params(self.config, self.packed))

    @cached_property
    def engine(self) -> AbstractEngine:
        """The engine that answers the tasks."""
        context = slot_context(own_context(self.longest, self.config))
        return AbstractEngine(self.config, self.recipe.traces.batch_size, context, CacheFormat(), self.mesh)

    @property
    def windows(self) -> set[int | None]:
        """The windows of the parent's layers; narrower ones need less."""
        return {block.window for block in self.config.blocks}

    def batch(self, **tokens_per_batch: int) -> MicroBatch:
        """The batch of the longest traces, without values."""
        rows, length = longest_batch(self.longest, **tokens_per_batch)
        spread = None if self._parts(rows) == 1 else batch_sharding(self.mesh)  # type: ignore[arg-type]
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=spread)
        by_position = [jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.bool_, jnp.float32)]
        by_row = [jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
        return MicroBatch._make([tokens, *by_position, *by_row])

    def packed_batch(self) -> PackedTraces:
        """The batch of the rows that hold the longest traces, without values."""
        length = row_length(self.longest)
        shape = (batch_rows(length), length)
        spread = None if self._parts(shape[0]) == 1 else batch_sharding(self.mesh)  # type: ignore[arg-type]
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=spread)
        others = [jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
        return PackedTraces._make([tokens, *others])

    def states(self, batch: MicroBatch | PackedTraces, slots: int | None = None) -> jax.ShapeDtypeStruct:
        """Hidden states of a batch, or of `slots` alternatives of each of its rows."""
        rows, length = batch.tokens.shape
        shape = (rows, length) if slots is None else (rows, slots, length)
        sharding = None
        if self.mesh is not None:
            sharding = NamedSharding(self.mesh, PartitionSpec("data" if self._parts(rows) > 1 else None))
        return jax.ShapeDtypeStruct((*shape, self.config.hidden_size), compiler().dtype, sharding=sharding)

    def _parts(self, rows: int) -> int:
        """Number of devices that a batch's rows are split over."""
        data = self.recipe.mesh.data
        return data if rows % data == 0 else 1


# Stages ---------------------------------------------------------------------------------------------------------------


def _load(run: PlannedSearch) -> Usage:
    config, where = run.config, None if run.mesh is None else params_sharding(run.config, run.mesh)
    # A tensor is read as stored, and transposed or, if it holds experts, decoded beside what is loaded already.
    head = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), compiler().dtype)
    head = head if where is None or "head" not in where else in_place(head, _turned(where["head"]))
    beside = {"head": device_bytes(head)}
    if run.stored_packed and not run.packed:
        stored = abstract.layer_params(config, run.mesh, lambda: zero_params(config, packed=True))["layers"][0]["moe"]
        for name in EXPERT_MATRICES:
            place = None if where is None else where["layers"][0]["moe"][name]
            made = _program_bytes(to_compute, stored[name], compiler().dtype, out_shardings=place)
            beside[name] = device_bytes(stored[name]) + made - device_bytes(run.params["layers"][0]["moe"][name])
    return Usage({"weights": device_bytes(run.params)}, max(beside.values()))


def _turned(place: NamedSharding) -> NamedSharding:
    return NamedSharding(place.mesh, PartitionSpec(*place.spec[::-1]))


def _trace(run: PlannedSearch) -> Usage:
    usage = run.engine.usage(run.params)
    return replace(usage, held={"weights": device_bytes(run.params), **usage.held})


def _rank(run: PlannedSearch) -> Usage:
    config, batch = run.config, run.packed_batch()
    x, sums = run.states(batch), jax.eval_shape(lambda: rank.no_sums(config))
    key = jax.eval_shape(lambda: jax.random.key(0))

    layer = run.params["layers"][0]

    def attention(window: int | None) -> int:
        return _program_bytes(rank.attend, layer["attention"], config, window, x, batch, mesh=run.mesh)

    given = (layer["moe"], config, x, batch.weight, sums, key)
    mixture = _program_bytes(rank.add_mixture, *given, mesh=run.mesh, donate=4)
    held = _held(run, batch, states=device_bytes(x), sums=config.num_layers * device_bytes(sums))
    return Usage(held, max(mixture, *map(attention, run.windows)))


def _lens(run: PlannedSearch) -> Usage:
    config, batch, x, suffix, answers = _scored(run)
    square = jax.ShapeDtypeStruct((config.hidden_size,) * 2, jnp.float32)
    sums = jax.eval_shape(lambda: lens.LensSums.zeros(config.hidden_size))
    many = device_bytes(suffix)
    beside = {
        "fit": _program_bytes(lens.add_states, sums, x, x, answers, mesh=run.mesh, donate=0),
        "enter": many + _enter(run, x, suffix),
        "through": many + _program_bytes(lens.through_lens, square, x, x, suffix, mesh=run.mesh),
        "compare": 2 * many + _compare(run, x, suffix, answers),
    }
    states = (_kept_states(run) + 2) * device_bytes(x)  # the base's and the parent's after the layer
    of_layers = config.num_layers * (device_bytes(sums) + device_bytes(square))
    return Usage(_held(run, batch, states=states, sums=of_layers), max(beside.values()))


def _score(run: PlannedSearch) -> Usage:
    config, batch, x, suffix, answers = _scored(run)
    layer, mask = run.params["layers"][0], jax.ShapeDtypeStruct((config.blocks[0].num_experts,), jnp.bool_)
    many = device_bytes(suffix)

    def attention(window: int | None) -> int:
        return _program_bytes(score.run_attention, layer["attention"], config, window, suffix, mesh=run.mesh)

    beside = {
        # Two such arrays are held while a mixture runs: the layer's input and the output of attention.
        "attention": many + max(map(attention, run.windows)),
        "mixture": 2 * many + _program_bytes(score.run_mixture, layer["moe"], config, suffix, mask, mesh=run.mesh),
        "enter": many + _enter(run, x, suffix),
        "compare": many + _compare(run, x, suffix, answers),
    }
    states = (_kept_states(run) + 1) * device_bytes(x)  # the parent's last
    return Usage(_held(run, batch, states=states), max(beside.values()))


def _calibrate(run: PlannedSearch) -> Usage:
    config, batch = run.config, run.batch()
    distinct = {block.window: layer for layer, block in reversed(list(enumerate(config.blocks)))}
    some = replace(config, blocks=tuple(config.blocks[layer] for layer in distinct.values()))
    params = {**run.params, "layers": [run.params["layers"][layer] for layer in distinct.values()]}
    beside = _program_bytes(calibrate.largest_by_layer, params, some, batch.tokens, batch.valid, None, mesh=run.mesh)
    return Usage(_held(run, batch), beside)


def _program_bytes(program: Callable[..., PyTree], *given: PyTree, **options: Any) -> int:
    """`abstract.program_bytes` of a function whose arguments may hold packed experts."""
    inner = getattr(program, "__wrapped__", program)
    return program_bytes(lambda *values: inner(*map(one_layer, values)), *given, **options)


def _held(run: PlannedSearch, batch: MicroBatch | PackedTraces, **more: int) -> dict[str, int]:
    return {"weights": device_bytes(run.params), "batch": device_bytes(batch), **more}


def _scored(run: PlannedSearch) -> tuple[ModelConfig, MicroBatch, _States, _States, score.Answers]:
    """A batch that is scored, its states, those of its alternatives, and its answers, counted as all of its tokens."""
    settings = run.recipe.score
    batch = run.batch(tokens_per_batch=settings.tokens_per_batch)
    size = (math.prod(batch.tokens.shape),)
    index, weight = (jax.ShapeDtypeStruct(size, dtype) for dtype in (jnp.int32, jnp.float32))
    answers = score.Answers._make([index, index, weight, index])
    return run.config, batch, run.states(batch), run.states(batch, settings.per_call), answers


def _enter(run: PlannedSearch, x: _States, batch: _States) -> int:
    slots, experts = run.recipe.score.per_call, run.config.blocks[0].num_experts
    masks, entry = (jax.ShapeDtypeStruct(shape, jnp.bool_) for shape in ((slots, experts), (slots,)))
    moe = run.params["layers"][0]["moe"]
    return _program_bytes(score.enter_mixture, moe, run.config, x, masks, entry, batch, mesh=run.mesh)


def _compare(run: PlannedSearch, x: _States, batch: _States, answers: score.Answers) -> int:
    head = head_params(run.params)
    return _program_bytes(score.compare_states, head, run.config, x, batch, answers, mesh=run.mesh)


def _kept_states(run: PlannedSearch) -> int:
    """Hidden states of the base held while a part of it is worked on: the kept ones below, and two per layer of it."""
    layers, every = run.config.num_layers, run.recipe.score.keep_every
    parts = range(math.ceil(layers / every))
    return max(below + 2 * min(every, layers - below * every) for below in parts)
