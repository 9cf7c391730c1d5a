"""The losses of pretraining: next token on packed rows, and balance of the experts.

    loss = sum(weights * -log p(target)) / sum(weights)  +  balance * mean over layers of E * sum_e f_e P_e

f_e is the share of choices that fell on expert e, P_e its mean router probability (Switch Transformers,
arXiv 2101.03961, equations 4 to 6). Padding counts in neither.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.table import smallest_form
from puzzle_jax.model.network import LayerAux, head_logits, hidden_states
from puzzle_jax.model.spec import Params
from puzzle_jax.train.fake_quant import fake_quantize_experts
from puzzle_jax.train.rows import Packed

EFFECTIVE_EXPERTS = "effective_experts/"
"""Prefix of a layer's number in the names of metrics."""


def pretraining_loss(
    config: ModelConfig, balance: float, params: Params, fixed: None, batch: Packed, key: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """A micro-batch's total loss times its weight, that weight, and metrics times that weight (`train.step`).

    Metrics are "next_token", in nats, and how many experts each layer uses (`effective_experts`). All layers must have
    the same number of experts.
    """
    tokens, targets, weights, segment_ids = map(jnp.asarray, batch[:4])
    if smallest_form(config) == "mxfp4":
        params = jax.lax.cond(batch.extras["rounded"], fake_quantize_experts, lambda params: params, params)
    x, auxes = hidden_states(params, config, tokens, segment_ids=segment_ids)
    logits = head_logits(params, config, x)
    weight = jnp.sum(weights)
    next_token = next_token_loss(logits, targets, weights)
    real = (segment_ids > 0).reshape(-1)
    with jax.named_scope("balance"):
        losses, loads = zip(*(balance_loss(aux, real) for aux in auxes), strict=True)
    total = next_token + balance * sum(losses) / len(losses)
    used = {f"{EFFECTIVE_EXPERTS}{layer}": effective_experts(load) for layer, load in enumerate(loads)}
    return total * weight, weight, {name: value * weight for name, value in {"next_token": next_token, **used}.items()}


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


def effective_experts(load: Float[Array, "*layers experts"]) -> Float[Array, "*layers"]:
    """exp of the load's entropy: how many experts would carry it if they carried it evenly."""
    share = load / jnp.sum(load, axis=-1, keepdims=True)
    return jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-30)), axis=-1))
