"""The device side of generation: the state of all slots, and the three programs that change it.

    prefill   runs a chunk of the prompts of a group of rows, which have caches of their own
    admit     copies finished rows of the group into free slots, one row into several if their prompts are equal
    decode    runs steps of all slots until enough of them are idle

Every program has one shape for a whole run, and no step mixes rows, so a request's tokens do not depend on which
others run beside it: bit for bit on CPU in float32, where a matmul of fixed shape treats all its rows alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate.sampling import sample
from puzzle_jax.model.cache import LayerCache, decode_step, init_cache, prefill_chunk
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.child import View
from puzzle_jax.model.network import LayerAux, head_logits
from puzzle_jax.model.schedule import jit_layers
from puzzle_jax.model.sharding import replicated
from puzzle_jax.model.spec import Params


class Group(NamedTuple):
    """Rows that are being prefilled.

    Attributes:
      caches: caches of every layer.
      hidden: the last layer's output at the prompt's last token, once that has been reached.
      experts: ids of the chosen experts by position, if requested.
    """

    caches: list[LayerCache]
    hidden: Float[Array, "rows hidden"]
    experts: UInt[Array, "rows context layers k"] | None


class Slots(NamedTuple):
    """The state of all slots.

    Attributes:
      caches: caches of every layer.
      logits: logits from which the next token is drawn.
      positions: position of the next token; in an idle slot, of the last one.
      counts, limits: number of tokens drawn, and its limit.
      seeds: seeds of the sampling noise.
      idle: slots without a request, or with a finished one.
      tokens, log_probs: tokens drawn so far, and their log-probabilities under the model itself, at temperature 1.
      experts: ids of the chosen experts by position, the prompt included.
    """

    caches: list[LayerCache]
    logits: Float[Array, "slots vocab"]
    positions: Int[Array, "slots"]
    counts: Int[Array, "slots"]
    limits: Int[Array, "slots"]
    seeds: Int[Array, "slots"]
    idle: Bool[Array, "slots"]
    tokens: Int[Array, "slots context"]
    log_probs: Float[Array, "slots context"] | None
    experts: UInt[Array, "slots context layers k"] | None


State = TypeVar("State", Group, Slots)


class Places(NamedTuple):
    """Shardings of arrays with a row per slot (or row of a group), of caches, and of scales; None without a mesh."""

    rows: NamedSharding | None = None
    caches: NamedSharding | None = None
    everywhere: NamedSharding | None = None

    @staticmethod
    def on(mesh: Mesh | None, rows: int, config: ModelConfig) -> Places:
        """Rows over "data" and key-value heads over "model", where these axes divide them evenly."""
        if mesh is None:
            return Places()
        data = "data" if rows % mesh.shape["data"] == 0 else None
        model = "model" if config.num_kv_heads % mesh.shape["model"] == 0 else None
        axes = PartitionSpec(data), PartitionSpec(data, model), PartitionSpec()
        return Places(*(NamedSharding(mesh, each) for each in axes))

    def of(self, state: State) -> State:
        """A tree of shardings with the structure of a state, or of its shapes."""

        def over(x: PyTree, sharding: NamedSharding | None) -> PyTree:
            return jax.tree.map(lambda _: sharding, x)

        caches: PyTree = [
            LayerCache(self.caches, self.caches, *over((c.k_scale, c.v_scale), self.everywhere))  # type: ignore[arg-type]
            for c in state.caches
        ]
        return over(state._replace(caches=[]), self.rows)._replace(caches=caches)


class Admission(NamedTuple):
    """Distinct slots and the row of a group that each takes, with the row's prompt length and the slot's own limit and
    seed. Entries from `count` on pad the arrays to a fixed length and have no effect.
    """

    count: Int[Array | np.ndarray, ""]
    slots: Int[Array | np.ndarray, "entries"]
    rows: Int[Array | np.ndarray, "entries"]
    lengths: Int[Array | np.ndarray, "entries"]
    limits: Int[Array | np.ndarray, "entries"]
    seeds: Int[Array | np.ndarray, "entries"]


def expert_id_dtype(config: ModelConfig) -> np.dtype:
    """The smallest unsigned dtype that holds every expert id."""
    return np.dtype(np.uint8 if max(block.num_experts for block in config.blocks) <= 256 else np.uint16)


def _empty(
    config: ModelConfig, rows: int, context: int, dtype: jnp.dtype, form: CacheFormat, experts: bool, mesh: Mesh | None
) -> tuple[list[LayerCache], Array | None]:
    places = Places.on(mesh, rows, config)
    caches = [
        init_cache(config, layer, rows, context, dtype, form, sharding=places.caches)
        for layer in range(config.num_layers)
    ]
    scales = replicated([(c.k_scale, c.v_scale) for c in caches], mesh)
    caches = [LayerCache(c.k, c.v, *pair) for c, pair in zip(caches, scales, strict=True)]
    shape = (rows, context, config.num_layers, config.experts_per_token)
    return caches, jnp.zeros(shape, expert_id_dtype(config), device=places.rows) if experts else None


def empty_group(
    config: ModelConfig,
    rows: int,
    context: int,
    dtype: jnp.dtype,
    form: CacheFormat,
    *,
    experts: bool,
    mesh: Mesh | None = None,
) -> Group:
    """A group of rows whose prompts are still to be run, allocated directly on its devices."""
    caches, chosen = _empty(config, rows, context, dtype, form, experts, mesh)
    hidden = jnp.zeros((rows, config.hidden_size), dtype, device=Places.on(mesh, rows, config).rows)
    return Group(caches, hidden, chosen)


def empty_slots(
    config: ModelConfig,
    slots: int,
    context: int,
    dtype: jnp.dtype,
    form: CacheFormat,
    *,
    log_probs: bool,
    experts: bool,
    mesh: Mesh | None = None,
) -> Slots:
    """Idle slots, allocated directly on their devices: all together may be more than one device holds."""
    caches, chosen = _empty(config, slots, context, dtype, form, experts, mesh)
    rows = Places.on(mesh, slots, config).rows
    zeros = partial(jnp.zeros, device=rows)
    return Slots(
        caches=caches,
        logits=zeros((slots, config.vocab_size), jnp.float32),
        positions=zeros(slots, jnp.int32),
        counts=zeros(slots, jnp.int32),
        limits=zeros(slots, jnp.int32),
        seeds=zeros(slots, jnp.int32),
        idle=jnp.ones(slots, bool, device=rows),
        tokens=zeros((slots, context), jnp.int32),
        log_probs=zeros((slots, context), jnp.float32) if log_probs else None,
        experts=chosen,
    )


def read_row(arrays: PyTree, row: int, mesh: Mesh | None) -> PyTree:
    """One row of each array, gathered on the host of every process; all processes must call this together."""
    return jax.device_get(_row_reader(mesh)(arrays, np.int32(row)))


@lru_cache(maxsize=8)
def _row_reader(mesh: Mesh | None) -> Callable[[PyTree, np.int32], PyTree]:
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda arrays, row: jax.tree.map(lambda x: x[row], arrays), out_shardings=everywhere)


def _view_options(view: View | None, layers: int) -> dict[str, list[Array]]:
    if view is None:
        return {}
    return {
        "windows": [view.windows[i] for i in range(layers)],
        "expert_masks": [view.expert_masks[i] for i in range(layers)],
    }


def _chosen(auxes: list[LayerAux], rows: int, dtype: np.dtype) -> UInt[Array, "rows seq layers k"]:
    ids = jnp.stack([aux.routing.ids for aux in auxes], axis=1)  # [rows * seq, layers, k]
    return ids.reshape(rows, -1, *ids.shape[1:]).astype(dtype)


@jit_layers(static_argnames=("config", "context"), donate_argnames="group")
def prefill(
    params: Params,
    config: ModelConfig,
    group: Group,
    tokens: Int[Array, "rows chunk"],
    start: Int[Array, ""],
    lengths: Int[Array, "rows"],
    context: int,
    view: View | None,
) -> Group:
    """Runs one chunk of every row's prompt; see `model.cache.prefill_chunk`."""
    options = _view_options(view, config.num_layers)
    x, caches, auxes = prefill_chunk(params, config, group.caches, tokens, start, lengths, context=context, **options)
    last = lengths - 1 - start
    here = (last >= 0) & (last < tokens.shape[1])
    index = jnp.clip(last, 0, tokens.shape[1] - 1)[:, None, None]
    hidden = jnp.where(here[:, None], jnp.take_along_axis(x, index, axis=1)[:, 0], group.hidden)
    experts = group.experts
    if experts is not None:
        chosen = _chosen(auxes, tokens.shape[0], experts.dtype)
        experts = jax.lax.dynamic_update_slice_in_dim(experts, chosen, start, 1)
    return Group(caches, hidden, experts)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def admit(params: Params, config: ModelConfig, state: Slots, group: Group, admission: Admission) -> Slots:
    """Copies rows of a group, whose prompts have been run, into slots."""
    with jax.named_scope("admit"):

        def copy(old: Array | None, new: Array | None) -> Array | None:
            """Copies row by row, in place."""
            if old is None or new is None:
                return None

            def one(entry: Array, old: Array) -> Array:
                value = jax.lax.dynamic_slice_in_dim(new, admission.rows[entry], 1, 0)
                return jax.lax.dynamic_update_slice_in_dim(old, value.astype(old.dtype), admission.slots[entry], 0)

            return jax.lax.fori_loop(0, admission.count, one, old)

        meant = jnp.arange(admission.slots.shape[0]) < admission.count
        slots = jnp.where(meant, admission.slots, state.idle.shape[0])  # beyond the last slot, nothing is written

        def write(old: Array, new: ArrayLike) -> Array:
            return old.at[slots].set(new, mode="drop")

        return state._replace(
            caches=[
                old._replace(k=copy(old.k, new.k), v=copy(old.v, new.v))
                for old, new in zip(state.caches, group.caches, strict=True)
            ],
            logits=copy(state.logits, head_logits(params, config, group.hidden)),
            positions=write(state.positions, admission.lengths),
            counts=write(state.counts, 0),
            limits=write(state.limits, admission.limits),
            seeds=write(state.seeds, admission.seeds),
            idle=write(state.idle, False),
            experts=copy(state.experts, group.experts),
        )


@jit_layers(static_argnames=("config", "top_p"), donate_argnames="state")
def decode(
    params: Params,
    config: ModelConfig,
    state: Slots,
    stops: Int[Array, "stops"],
    temperature: float | Float[Array, ""],
    steps: int | Int[Array, ""],
    idle_target: int | Int[Array, ""],
    view: View | None,
    top_p: float,
) -> Slots:
    """Decodes for at most `steps` steps, or until `idle_target` slots are idle; see `sampling.sample`."""
    options = _view_options(view, config.num_layers)
    rows = jnp.arange(state.idle.shape[0])

    def step(carry: tuple[Array, Slots]) -> tuple[Array, Slots]:
        done, state = carry
        with jax.named_scope("sample"):
            token = sample(state.logits, state.seeds, state.counts, temperature, top_p)
            place = jnp.where(state.idle, state.tokens.shape[1], state.counts)  # an idle slot writes nowhere
            tokens = state.tokens.at[rows, place].set(token, mode="drop")
            log_probs = state.log_probs
            if log_probs is not None:
                drawn = jnp.take_along_axis(jax.nn.log_softmax(state.logits), token[:, None], axis=1)[:, 0]
                log_probs = log_probs.at[rows, place].set(drawn, mode="drop")
        counts = state.counts + ~state.idle
        idle = state.idle | jnp.isin(token, stops) | (counts >= state.limits)
        logits, caches, auxes = decode_step(params, config, state.caches, token, state.positions, **options)
        experts = state.experts
        if experts is not None:
            chosen = _chosen(auxes, rows.shape[0], experts.dtype)[:, 0]
            experts = experts.at[rows, state.positions].set(chosen)
        positions = state.positions + ~idle
        return done + 1, state._replace(
            caches=caches,
            logits=logits,
            positions=positions,
            counts=counts,
            idle=idle,
            tokens=tokens,
            log_probs=log_probs,
            experts=experts,
        )

    def more(carry: tuple[Array, Slots]) -> Array:
        done, state = carry
        return (done < steps) & (jnp.sum(state.idle) < idle_target)

    return jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state))[1]
