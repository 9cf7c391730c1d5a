"""Expert ranking: one streaming pass over the traces scores every expert of every layer by several methods.

    removal_error   mean over tokens of mean_d (y'_{t,e} - y_t)^2, where y' is the mixture's output with e removed and
                    the token routed again. With a top-k router the expert that enters is always the (k+1)-th, so the
                    top k+1 experts, evaluated once, give all k counterfactuals exactly.
    reap            mean over the tokens routed to e of gate * |expert output| (arXiv 2510.13999)
    frequency       share of tokens routed to e

Every valid token of a trace counts, prompt included, and every trace counts the same, however long it is. Experts
that were never routed to rank last under every method. Memory does not grow with the number of traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.kernels.expert_mlp import expert_outputs
from puzzle_jax.kernels.route import top_k_ids
from puzzle_jax.model.network import attention_block, embed, rms_norm
from puzzle_jax.model.rope import rope_table
from puzzle_jax.model.spec import Params, layer_experts

METHODS = ("removal_error", "reap", "frequency")


class Ranking(NamedTuple):
    """Scores by method, [layers, experts], higher is kept; and routed tokens per expert, each trace counting 1."""

    scores: Mapping[str, np.ndarray]
    routed: np.ndarray

    def keep(self, method: str, layer: int, count: int) -> tuple[int, ...]:
        """Ids of the `count` best experts of a layer, ascending; equal scores go to the one routed to more often."""
        order = np.lexsort((-self.routed[layer], -self.scores[method][layer]))
        return tuple(sorted(int(i) for i in order[:count]))


class _Sums(NamedTuple):
    removal: Float[Array, "experts"]
    gated_norm: Float[Array, "experts"]
    routed: Float[Array, "experts"]
    tokens: Float[Array, ""]  # weighted, like the others


def rank_experts(
    params: Params,
    config: ModelConfig,
    batches: Iterable[MicroBatch],
    on_batch: Callable[[], None] | None = None,
) -> Ranking:
    """Streams batches through the parent, whose layers must have equally many experts."""
    layers, experts = config.num_layers, config.blocks[0].num_experts
    zeros = jnp.zeros(experts)
    sums = [_Sums(zeros, zeros, zeros, jnp.zeros(())) for _ in range(layers)]
    for batch in batches:
        x = _embed(params, batch.tokens)
        for index, layer in enumerate(params["layers"]):
            window = config.blocks[index].window
            x, new = _rank_layer(layer, config, window, x, batch)
            sums[index] = jax.tree.map(jnp.add, sums[index], new)
        if on_batch is not None:
            on_batch()
    removal, gated_norm, routed, tokens = (
        np.stack([np.asarray(of_layer[part], np.float64) for of_layer in sums]) for part in range(4)
    )
    scores = {
        "removal_error": removal / tokens[:, None],
        "reap": gated_norm / np.maximum(routed, 1e-30),
        "frequency": routed / tokens[:, None],
    }
    return Ranking({name: np.where(routed == 0, -np.inf, value) for name, value in scores.items()}, routed)


_embed = jax.jit(embed)


@partial(jax.jit, static_argnames=("config", "window"))
def _rank_layer(
    layer: Params, config: ModelConfig, window: int | None, x: Float[Array, "rows seq hidden"], batch: MicroBatch
) -> tuple[Float[Array, "rows seq hidden"], _Sums]:
    """One layer of the parent, and its sums over the batch."""
    table = rope_table(config.rope, config.head_dim, jnp.arange(x.shape[1])[None])
    x, _ = attention_block(layer["attention"], config, x, table, window=window)
    moe, k, experts = layer["moe"], config.experts_per_token, config.blocks[0].num_experts
    y = rms_norm(x, moe["norm"], config.rms_norm_eps).reshape(-1, x.shape[-1])
    logits = (y @ moe["router_weight"] + moe["router_bias"]).astype(jnp.float32)
    ids = top_k_ids(logits, min(k + 1, experts))
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    outputs = expert_outputs(y, ids, layer_experts(moe), limit=config.swiglu_limit).astype(jnp.float32)
    gates = jax.nn.softmax(chosen[:, :k], axis=-1)
    out = jnp.einsum("tk,tkh->th", gates, outputs[:, :k])
    weight = (batch.valid / jnp.maximum(batch.lengths, 1)[:, None]).reshape(-1)
    sums = _Sums(
        removal=_removal_errors(chosen, outputs, out, k) if experts > k else jnp.zeros((y.shape[0], k)),
        gated_norm=gates * jnp.linalg.norm(outputs[:, :k], axis=-1),
        routed=jnp.ones_like(gates),
        tokens=jnp.sum(weight),
    )

    def by_expert(per_choice: Float[Array, "tokens k"]) -> Float[Array, "experts"]:
        return jnp.zeros(experts).at[ids[:, :k]].add(per_choice * weight[:, None])

    new = _Sums(by_expert(sums.removal), by_expert(sums.gated_norm), by_expert(sums.routed), sums.tokens)
    return x + out.reshape(x.shape).astype(x.dtype), new


def _removal_errors(
    chosen: Float[Array, "tokens k_plus_1"],
    outputs: Float[Array, "tokens k_plus_1 hidden"],
    out: Float[Array, "tokens hidden"],
    k: int,
) -> Float[Array, "tokens k"]:
    """Mean squared change of the mixture's output when each of the k chosen experts is removed."""
    errors = []
    for removed in range(k):
        stays = jnp.arange(k + 1) != removed
        gates = jax.nn.softmax(jnp.where(stays, chosen, -jnp.inf), axis=-1)
        changed = jnp.einsum("tk,tkh->th", gates, outputs)
        errors.append(jnp.mean((changed - out) ** 2, axis=-1))
    return jnp.stack(errors, axis=-1)
