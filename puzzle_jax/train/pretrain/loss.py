"""The losses of pretraining: next token on packed rows, and balance of the experts.

    loss = sum(weights * -log p(target)) / sum(weights)  +  balance * mean over layers of E * sum_e f_e P_e

f_e is the share of choices that fell on expert e, P_e its mean router probability (Switch Transformers,
arXiv 2101.03961, equations 4 to 6). Padding counts in neither.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.network import LayerAux, head_logits, hidden_states
from puzzle_jax.model.spec import Params
from puzzle_jax.train.pretrain.data import Batch


class Metrics(NamedTuple):
    """What a step reports.

    Attributes:
      next_token: mean negative log-likelihood of the learned tokens, in nats.
      load: share of each layer's choices that fell on each expert.
    """

    next_token: Float[Array, ""]
    load: Float[Array, "layers experts"]


def pretraining_loss(
    params: Params, config: ModelConfig, batch: Batch, balance: float
) -> tuple[Float[Array, ""], Metrics]:
    """The whole loss and its parts. All layers must have equally many experts."""
    tokens, targets, weights, segment_ids = (jnp.asarray(part) for part in batch)
    x, auxes = hidden_states(params, config, tokens, segment_ids=segment_ids)
    logits = head_logits(params, config, x)
    next_token = next_token_loss(logits, targets, weights)
    real = (segment_ids > 0).reshape(-1)
    with jax.named_scope("balance"):
        parts = [balance_loss(aux, real) for aux in auxes]
    penalty = sum(loss for loss, _ in parts) / len(parts)
    return next_token + balance * penalty, Metrics(next_token, jnp.stack([load for _, load in parts]))


def next_token_loss(
    logits: Float[Array, "rows length vocab"],
    targets: Int[Array, "rows length"],
    weights: Float[Array, "rows length"],
) -> Float[Array, ""]:
    """Weighted mean negative log-likelihood; 0 when every weight is 0."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(loss * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def balance_loss(aux: LayerAux, real: Bool[Array, "tokens"]) -> tuple[Float[Array, ""], Float[Array, "experts"]]:
    """E * sum_e f_e P_e over the tokens marked real (1 when perfectly even), and the load f."""
    experts = aux.router_logits.shape[-1]
    weights = real.astype(jnp.float32) / jnp.maximum(jnp.sum(real), 1)
    probability = weights @ jax.nn.softmax(aux.router_logits.reshape(-1, experts), axis=-1)
    chosen = jnp.sum(jax.nn.one_hot(aux.routing.ids, experts), axis=1)
    load = weights @ chosen / aux.routing.ids.shape[-1]
    return experts * jnp.sum(load * probability), load
