"""The forward pass of a mixture-of-experts transformer, as functions over pytrees, in reading order.

    x += attention(rms_norm(x));  x += mixture(rms_norm(x));  logits = rms_norm(x) @ head

Each layer has its own window and expert count (`ModelConfig.blocks`). A child that is only chosen, not yet cut, runs as
a view on its parent: `expert_mask` removes experts and `window` narrows attention, both as data, so that many
alternatives share one compiled program. What blocks consist of follows from the parameters that they have
(`config.Variant`). Numerics follow the published models: norms, softmax and accumulation in float32, everything else in
the dtype of the norms' weights; matrices may be stored in fewer bits, and are cast where they are used.

Left out: caches (`model.cache`), and choosing weights' dtype and placement (`model.sharding`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.kernels.expert_mlp import expert_mlp
from puzzle_jax.kernels.mxfp4 import MOST_DECODED, MXFP4, as_dense
from puzzle_jax.kernels.prefix_attention import Layout, prefix_attention
from puzzle_jax.kernels.route import Routing, route
from puzzle_jax.kernels.shapes import Ids, IntScalar, Keys, Queries, Segments, Window
from puzzle_jax.kernels.window_attention import window_attention
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.rope import RopeTable, rope_table, rotate
from puzzle_jax.model.spec import Params, is_dense, layer_experts, output_head

States = Float[Array, "batch seq hidden"]
Batch = Int[Array, "batch seq"]
"""Token ids."""
ExpertMask = Bool[Array, "experts"] | Bool[Array, "batch experts"] | None


class QKV(NamedTuple):
    """Rotated queries and keys, and values, of one attention sub-block."""

    q: Queries
    k: Keys
    v: Keys


class LayerAux(NamedTuple):
    """A router's logits and choices, for load balancing, ranking and replay."""

    router_logits: Float[Array, "batch seq experts"]
    routing: Routing  # ids and gates, [batch * seq, k]


def traced_mesh() -> AbstractMesh | None:
    """The mesh of `model.sharding.on_mesh` where that is in force, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def rms_norm(x: Float[Array, "... hidden"], weight: Float[Array, "hidden"], eps: float) -> Float[Array, "... hidden"]:
    """x / rms(x) * weight, in float32, cast last."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x @ weight, plus the bias if there is one, with float32 accumulation, in the dtype of `x`."""
    y = jnp.matmul(x, cast_beside(weight, x), preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def cast_beside(weight: Array, rows: Array) -> Array:
    """`weight` in the dtype of the rows that it is multiplied with.

    A weight that is stored in fewer bits is cast only when its rows are available: otherwise XLA would keep a decoding
    loop's casts across its steps, which takes the memory that storing in fewer bits saves.
    """
    if weight.dtype == rows.dtype:
        return weight
    return jax.lax.optimization_barrier((weight, rows))[0].astype(rows.dtype)


def states_dtype(params: Params) -> jnp.dtype:
    """The dtype of hidden states: that of the final norm's weight."""
    return params["final_norm"].dtype


def embed(params: Params, tokens: Batch) -> States:
    with jax.named_scope("embed"):
        table = params["embedding"]
        if table.dtype != states_dtype(params):  # as in `cast_beside`
            table, tokens = jax.lax.optimization_barrier((table, tokens))
        return table[tokens].astype(states_dtype(params))


def project_qkv(attention: Params, config: ModelConfig, x: States, table: RopeTable) -> QKV:
    """Norm, projections and rotation of one attention sub-block."""
    with jax.named_scope("qkv"):
        y = rms_norm(x, attention["norm"], config.rms_norm_eps)
        heads = (*y.shape[:-1], -1, config.head_dim)
        q, k, v = (
            linear(y, attention[f"{name}_weight"], attention.get(f"{name}_bias")).reshape(heads) for name in "qkv"
        )
        if "q_norm" in attention:
            q = rms_norm(q, attention["q_norm"], config.rms_norm_eps)
            k = rms_norm(k, attention["k_norm"], config.rms_norm_eps)
        return QKV(rotate(q, table), rotate(k, table), v)


def attention_block(
    attention: Params,
    config: ModelConfig,
    x: States,
    table: RopeTable,
    *,
    window: Window,
    segment_ids: Segments = None,
    cache: CacheFormat | None = None,
    layer: int = 0,
    layout: Layout | None = None,
    positions: Int[Array, "#batch seq"] | None = None,
) -> tuple[States, QKV]:
    """x + attention(rms_norm(x)), and the keys and values that a cache keeps.

    With `layout`, a row holds a prompt and answers to it (`kernels.prefix_attention`, which needs `positions`). With
    `cache`, keys and values are read as that format gives them back for layer number `layer`. Traced on a mesh that
    shards positions, devices exchange positions for heads.
    """
    qkv = project_qkv(attention, config, x, table)
    if cache is not None:
        k, v = cache.round_trip(layer, qkv.k, qkv.v)
        qkv = qkv._replace(k=k, v=v)
    options = {"window": window, "segment_ids": segment_ids, "mesh": traced_mesh()}
    with jax.named_scope("attention"):
        if layout is None:
            out = window_attention(*qkv, attention.get("sinks"), **options)
        else:
            assert positions is not None
            out = prefix_attention(*qkv, attention.get("sinks"), layout=layout, positions=positions, **options)
    return x + attention_output(attention, out), qkv


def attention_output(attention: Params, out: Float[Array, "*batch heads dim"]) -> Float[Array, "*batch hidden"]:
    """The output projection of concatenated heads."""
    with jax.named_scope("attention_output"):
        return linear(out.reshape(*out.shape[:-2], -1), attention["o_weight"], attention.get("o_bias"))


def route_tokens(
    moe: Params, config: ModelConfig, y: States, *, expert_mask: ExpertMask = None, replay: Ids | None = None
) -> LayerAux:
    """Router logits of normalised hidden states and the experts chosen from them."""
    with jax.named_scope("route"):
        logits = router_logits(moe, y)
        if expert_mask is not None and expert_mask.ndim == 2:  # a row of the batch is seq tokens
            expert_mask = jnp.repeat(expert_mask, y.shape[1], axis=0)
        elif expert_mask is not None:
            expert_mask = expert_mask[None]
        flat = logits.reshape(-1, logits.shape[-1])
        normalized = config.variant.normalized_gates
        chosen = route(flat, config.experts_per_token, mask=expert_mask, ids=replay, normalized=normalized)
        return LayerAux(logits, chosen)


def router_logits(moe: Params, y: Float[Array, "*batch hidden"]) -> Float[Array, "*batch experts"]:
    """Router logits of normalised hidden states, in float32."""
    logits = jnp.matmul(y, cast_beside(moe["router_weight"], y), preferred_element_type=jnp.float32)
    return logits + moe["router_bias"].astype(jnp.float32) if "router_bias" in moe else logits


def only_expert(config: ModelConfig, y: States) -> LayerAux:
    """The routing of a dense layer: every choice of every token is expert 0, and the first has the whole weight."""
    tokens, k = y.shape[0] * y.shape[1], config.experts_per_token
    gates = jnp.zeros((tokens, k), jnp.float32).at[:, 0].set(1.0)
    return LayerAux(jnp.zeros((*y.shape[:2], k), jnp.float32), Routing(jnp.zeros((tokens, k), jnp.int32), gates))


def moe_block(
    moe: Params, config: ModelConfig, x: States, *, expert_mask: ExpertMask = None, replay: Ids | None = None
) -> tuple[States, LayerAux]:
    """x + mixture(rms_norm(x)), and the router's decisions; expert-parallel where it is traced on a mesh.

    A dense layer reads neither mask nor replay; its routing is that of `only_expert`.
    """
    y = rms_norm(x, moe["norm"], config.rms_norm_eps)
    if is_dense(moe):
        aux = only_expert(config, y)
        routing = Routing(*(each[:, :1] for each in aux.routing))
    else:
        aux = route_tokens(moe, config, y, expert_mask=expert_mask, replay=replay)
        routing = aux.routing
    with jax.named_scope("experts"):
        out = expert_mlp(y, routing, layer_experts(moe), limit=config.swiglu_limit, mesh=traced_mesh())
    return x + out, aux


def head_logits(params: Params, config: ModelConfig, x: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
    """Final norm and output head; logits are float32. A large head stored in fewer bits is cast part by part."""
    with jax.named_scope("head"):
        y = rms_norm(x, params["final_norm"], config.rms_norm_eps)
        head = output_head(params)
        if head.dtype == y.dtype:
            return jnp.matmul(y, head, preferred_element_type=jnp.float32)
        parts = -(-head.size * y.dtype.itemsize // MOST_DECODED)
        width = -(-head.shape[1] // parts)

        def add(part: Int[Array, ""], logits: Array) -> Array:
            first = jnp.minimum(part * width, head.shape[1] - width)  # the last part overlaps the one before
            found = jnp.matmul(y, columns(head, first, width, y.dtype), preferred_element_type=jnp.float32)
            return jax.lax.dynamic_update_slice_in_dim(logits, found, first, axis=-1)

        return jax.lax.fori_loop(0, parts, add, jnp.zeros((*y.shape[:-1], head.shape[1]), jnp.float32))


def columns(head: Array, first: IntScalar, width: int, dtype: DTypeLike) -> Float[Array, "hidden width"]:
    """`width` columns of the head in `dtype`, from column `first`, which a loop computes; see `cast_beside`."""
    if head.dtype != dtype:
        head, first = jax.lax.optimization_barrier((head, first))
    return jax.lax.dynamic_slice_in_dim(head, first, width, axis=1).astype(dtype)


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens: Batch,
    *,
    positions: Batch | None = None,
    segment_ids: Segments = None,
    windows: Sequence[Window] | None = None,
    expert_masks: Sequence[ExpertMask] | None = None,
    replay: Sequence[Ids] | None = None,
    cache: CacheFormat | None = None,
) -> tuple[States, list[LayerAux]]:
    """The last layer's output before the final norm, and every layer's routing.

    Args:
      positions: rotary positions; counted from 0 in every row by default.
      segment_ids: positions attend within their segment only (packed sequences).
      windows: per layer, in place of the configuration's; see `kernels.window_attention`.
      expert_masks: per layer, False removes an expert; [experts], or [batch, experts] for one choice per row.
      replay: per layer, experts to use in place of the router's choice.
      cache: reads keys and values as a cache of this format gives them back, as generation does.
    """
    if positions is None:
        positions = jnp.arange(tokens.shape[1])[None]
    table = rope_table(config.rope, config.head_dim, positions)
    x = embed(params, tokens)
    auxes = []
    for index, (layer, block) in enumerate(zip(params["layers"], config.blocks, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            window = block.window if windows is None else windows[index]
            x, _ = attention_block(
                layer["attention"], config, x, table, window=window, segment_ids=segment_ids, cache=cache, layer=index
            )
            x, aux = moe_block(
                layer["moe"],
                config,
                x,
                expert_mask=None if expert_masks is None else expert_masks[index],
                replay=None if replay is None else replay[index],
            )
            auxes.append(aux)
    return x, auxes


def forward(params: Params, config: ModelConfig, tokens: Batch, **options: object) -> Float[Array, "batch seq vocab"]:
    """Logits of every position; options as in `hidden_states`."""
    x, _ = hidden_states(params, config, tokens, **options)  # pyright: ignore[reportArgumentType]
    return head_logits(params, config, x)


def to_compute(params: Params, dtype: jnp.dtype | type) -> Params:
    """Parameters as dense arrays of `dtype`: packed experts decoded, the rest cast."""
    return jax.tree.map(lambda leaf: as_dense(leaf, dtype), params, is_leaf=lambda node: isinstance(node, MXFP4))


def compute_dtype() -> jnp.dtype:
    """The dtype that models compute in: float32 on CPU, bfloat16 elsewhere."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
