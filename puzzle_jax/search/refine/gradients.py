"""First-order effects of giving one expert back to a child, for all experts of all layers by one backward pass.

For every layer, the gradient g of the KL to the parent at the mixture's output is computed. A token that an expert e
would serve if the child had it is routed again: e takes the place of the last of its k experts. The change of the
mixture's output is exact, and its inner product with g is the first-order change of the KL. Summed over tokens, this is
the effect of e, to first order in what e changes and with everything after the layer linearised.

Left out: the effect of removing an expert that a child has. It could be computed alike but says little, since a removal
moves the output far from a point at which the KL is nearly flat. So experts are only valued where they are missing, and
`search.refine.expert_values` draws children at random in which each is missing now and then.

Only gates and hidden states have gradients, no weights have. Every layer is run by the same compiled programs, which
recompute it when its gradient is due, so that memory holds one hidden state per half layer.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from puzzle_jax.config import ModelConfig
from puzzle_jax.evaluate.divergence import divergence
from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.kernels.expert_mlp import expert_outputs
from puzzle_jax.kernels.route import top_k_ids
from puzzle_jax.model.network import moe_block, rms_norm, route_tokens, traced_mesh
from puzzle_jax.model.sharding import on_mesh, read
from puzzle_jax.model.spec import Params, head_params, layer_experts
from puzzle_jax.processes.published import values_of
from puzzle_jax.search.score.replace_one import ReplaceOne, parent_choices, run_attention, run_mixture

FORWARDS = 5
"""Forward passes that `addition_effects` is worth: one, one more to recompute layers, two for the backward pass, and
one for the experts that are tried."""

States = Float[Array, "rows seq hidden"]


def addition_effects(
    run: ReplaceOne, batch: MicroBatch, masks: Bool[np.ndarray, "rows layers experts"], tried: int = 4
) -> tuple[Float[np.ndarray, "rows"], Float[np.ndarray, "rows layers experts"]]:
    """KL of a child per row, and the first-order change of that KL by each expert that the child lacks.

    Args:
      run: the parent's parameters, and in `base` the windows of the children, which are the same for all rows.
      batch: traces of the parent, one per row.
      masks: experts that each row's child keeps, at least `experts_per_token` in every layer.
      tried: experts that each token is routed to in turn, the likeliest by its router among those that the child lacks;
        others have no effect on the token.

    Returns:
      Both in nats, summed over the completion tokens of a row; effects are 0 for experts that the child has.
    """
    weight = (batch.loss_weight > 0).astype(jnp.float32)
    parent = x = run.embedded(batch)
    for layer, choice in enumerate(parent_choices(run.config)):
        parent = run.layer(layer, parent, choice, run.config)
    states = []
    with on_mesh(run.mesh):
        for layer, choice in enumerate(run.choices):
            weights, mask = run.params["layers"][layer], jnp.asarray(masks[:, layer])
            middle = run_attention(weights["attention"], run.own, choice.window, x)
            states.append((x, middle))
            x = run_mixture(weights["moe"], run.config, middle, mask)
        head = head_params(run.params)
        kl, gradient = _kl_and_gradient(head, run.config, parent, x, weight)
        effects = []
        for layer in reversed(range(run.config.num_layers)):
            weights, mask, (before, middle) = run.params["layers"][layer], jnp.asarray(masks[:, layer]), states.pop()
            effect = _additions(weights["moe"], run.config, middle, mask, gradient, tried)
            gradient = _through_mixture(weights["moe"], run.config, middle, mask, gradient)
            gradient = _through_attention(weights["attention"], run.own, run.choices[layer].window, before, gradient)
            effects.append(effect)
        stacked = jnp.stack(effects[::-1], axis=1)
    return values_of(read(kl, run.mesh)), values_of(read(stacked, run.mesh))


@partial(jax.jit, static_argnames=("config",))
def _kl_and_gradient(
    head: Params, config: ModelConfig, parent: States, child: States, weight: Float[Array, "rows seq"]
) -> tuple[Float[Array, "rows"], States]:
    """Weighted KL of every row, and its gradient at the child's final states."""

    def of(states: States) -> tuple[Array, Array]:
        by_row = jnp.sum(divergence(head, config, parent, states).kl * weight, axis=-1)
        return jnp.sum(by_row), by_row

    gradient, by_row = jax.grad(of, has_aux=True)(child)
    return by_row, gradient


@partial(jax.jit, static_argnames=("config",))
def _through_mixture(
    moe: Params, config: ModelConfig, middle: States, mask: Bool[Array, "rows experts"], gradient: States
) -> States:
    """The gradient at a mixture's input."""
    return jax.vjp(lambda x: moe_block(moe, config, x, expert_mask=mask)[0], middle)[1](gradient)[0]


@partial(jax.jit, static_argnames=("config", "window"))
def _through_attention(
    attention: Params, config: ModelConfig, window: int | None, before: States, gradient: States
) -> States:
    """The gradient at an attention's input."""
    return jax.vjp(lambda x: run_attention(attention, config, window, x), before)[1](gradient)[0]


@partial(jax.jit, static_argnames=("config", "tried"))
def _additions(
    moe: Params, config: ModelConfig, middle: States, mask: Bool[Array, "rows experts"], gradient: States, tried: int
) -> Float[Array, "rows experts"]:
    """Inner products of the gradient with the changes of the mixture's output by each expert that is added."""
    rows, seq, hidden = middle.shape
    k, experts = config.experts_per_token, mask.shape[1]
    y = rms_norm(middle, moe["norm"], config.rms_norm_eps)
    logits = route_tokens(moe, config, y).router_logits.reshape(rows * seq, experts)
    has = jnp.repeat(mask, seq, axis=0)
    kept_logits, lost_logits = jnp.where(has, logits, -jnp.inf), jnp.where(has, -jnp.inf, logits)
    kept, lost = top_k_ids(kept_logits, k), top_k_ids(lost_logits, min(tried, experts))
    outputs = expert_outputs(
        y.reshape(-1, hidden),
        jnp.concatenate([kept, lost], axis=1),
        layer_experts(moe),
        limit=config.swiglu_limit,
        mesh=traced_mesh(),
    )
    # Mixtures are weighted sums of outputs, so their inner products are weighted sums of these.
    along = jnp.einsum("tch,th->tc", outputs.astype(jnp.float32), gradient.reshape(-1, hidden).astype(jnp.float32))
    of_kept = jnp.take_along_axis(kept_logits, kept, axis=1)
    of_lost = jnp.take_along_axis(lost_logits, lost, axis=1)
    now = jnp.sum(jax.nn.softmax(of_kept, axis=1) * along[:, :k], axis=1)

    def added(logit: Array, inner: Array) -> Array:
        """The change by one expert per token; it enters only where its logit exceeds that of the last of the k."""
        gates = jax.nn.softmax(jnp.concatenate([of_kept[:, : k - 1], logit[:, None]], axis=1), axis=1)
        new = jnp.sum(gates * jnp.concatenate([along[:, : k - 1], inner[:, None]], axis=1), axis=1)
        return jnp.where(logit > of_kept[:, k - 1], new - now, 0.0)

    changes = jax.vmap(added, in_axes=1, out_axes=1)(of_lost, along[:, k:])
    by_row = (jnp.arange(rows)[:, None, None], lost.reshape(rows, seq, -1))
    return jnp.zeros((rows, experts)).at[by_row].add(changes.reshape(rows, seq, -1))
