"""Routing: which experts process a token, and with what weights.

`route` picks the top k router logits and turns them into gates by a softmax over the chosen ones alone, or over all.
`expert_order` lays out the chosen (token, expert) pairs in blocks of one expert each, the layout that grouped
matmuls need. Both are pure functions with static shapes. Implementations: `mosaic_gpu` for Hopper and `mosaic_tpu`, one
kernel for both functions (`tally`), where they have passed their self-check; `reference`, plain XLA. These are two
calls because a mesh comes between them: a device lays out only the pairs of the experts that it holds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax.nn import logsumexp

from puzzle_jax.kernels.dispatch import dispatch
from puzzle_jax.kernels.grouped_matmul.layout import Blocks
from puzzle_jax.kernels.route import mosaic_gpu, mosaic_tpu, reference, tally
from puzzle_jax.kernels.route.reference import top_k_ids
from puzzle_jax.kernels.route.trial import order_trial, route_trial
from puzzle_jax.kernels.shapes import Array, Bool, Float, Ids

__all__ = ["IMPLEMENTATIONS", "ORDER_IMPLEMENTATIONS", "Routing", "expert_order", "route", "top_k_ids"]


class Routing(NamedTuple):
    """The experts of each token, best first, and their gates, which sum to one where they are `normalized`."""

    ids: Ids
    gates: Float[Array, "tokens k"]


IMPLEMENTATIONS: dict[str, Callable[..., tuple[Array, Array]]] = {
    "mosaic_gpu": partial(tally.route, mosaic_gpu.routed),
    "mosaic_tpu": partial(tally.route, mosaic_tpu.routed),
    "reference": reference.route,
}

ORDER_IMPLEMENTATIONS: dict[str, Callable[..., Blocks]] = {
    "mosaic_gpu": partial(tally.expert_order, mosaic_gpu.routed),
    "mosaic_tpu": partial(tally.expert_order, mosaic_tpu.routed),
    "reference": reference.expert_order,
}


def route(
    logits: Float[Array, "tokens experts"],
    k: int,
    *,
    mask: Bool[Array, "tokens experts"] | Bool[Array, "#tokens experts"] | None = None,
    ids: Ids | None = None,
    normalized: bool = True,
    implementation: str | None = None,
) -> Routing:
    """Chooses `k` experts per token.

    Args:
      logits: router logits.
      k: experts per token; among equal logits, the lower index comes first.
      mask: False removes an expert: its logit becomes minus infinity before the choice. At least `k` must remain.
      ids: choices to replay in place of the top k; gates are then those of the given experts.
      normalized: whether gates are a softmax over the chosen experts' logits (gpt-oss) or a softmax over the logits of
        all experts that are not removed, of which the chosen ones keep their share.
      implementation: pins one of `IMPLEMENTATIONS`.

    Differentiable in `logits` through the gates. Raises ValueError for a `k` below 1 or above the number of experts.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"cannot choose {k} of {logits.shape[-1]} experts")
    logits = logits.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    if not len(logits):
        return Routing(jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32))
    trial = partial(route_trial, logits, k, ids, route)
    routing = Routing(*dispatch("route", IMPLEMENTATIONS, implementation, logits, k, ids, trial=trial))
    return routing if normalized else routing._replace(gates=routing.gates * _chosen_share(logits, routing.ids))


def _chosen_share(logits: Float[Array, "tokens experts"], ids: Ids) -> Float[Array, "tokens 1"]:
    """The part of a softmax over all experts that the chosen ones have together."""
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    return jnp.exp(logsumexp(chosen, axis=-1, keepdims=True) - logsumexp(logits, axis=-1, keepdims=True))


def expert_order(ids: Ids, num_experts: int, block: int, *, implementation: str | None = None) -> Blocks:
    """Lays out flat pairs (token * k + choice) in blocks of one expert each; nothing is dropped.

    The source of a padding row is the number of pairs, which is out of range. Pairs with ids past the last expert share
    one slot beyond the end. `implementation` pins one of `ORDER_IMPLEMENTATIONS`.
    """
    trial = partial(order_trial, ids, num_experts, block, expert_order)
    return dispatch("expert_order", ORDER_IMPLEMENTATIONS, implementation, ids, num_experts, block, trial=trial)
