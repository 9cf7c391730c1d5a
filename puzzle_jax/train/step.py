"""One step of training, for any loss: gradients of a sum over micro-batches, one update, metrics.

    loss = sum_m numerator_m / sum_m weight_m        m: micro-batches

Micro-batches run one after another in a scan, which accumulates numerators, weights and gradients in float32; these are
divided once, at the end. So the split into micro-batches does not change the loss, whatever the weights of the parts.

A step whose loss or gradient is not finite changes neither parameters nor optimiser state, and is counted as skipped; a
batch whose weights are all 0 is such a case. Random bits depend only on the state's key, the step and the micro-batch.

Left out: mixed precision, which belongs to the loss (parameters come as fp32 master weights), and rematerialisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from puzzle_jax.model.schedule import compiler_options

Sums = tuple[Array, Array, dict[str, Array]]
LossFunction = Callable[[PyTree, PyTree, PyTree, Array], Sums]
"""(params, fixed, micro-batch, key) -> (numerator, weight, sums of metrics), all scalars; metrics are divided by the
weight, too."""


class TrainState(NamedTuple):
    """The state that a step updates.

    Attributes:
      step: number of steps made, including skipped ones.
      params: fp32 master weights of the parameters that learn, with None in place of frozen ones.
      optimizer: state of the optimiser.
      key: key from which a step's random bits are drawn.
      skipped: number of consecutive steps, up to now, whose loss or gradient was not finite.
    """

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree
    key: Key[Array, ""]
    skipped: Int[Array, ""]


class Shardings(NamedTuple):
    """Shardings of a step's arrays.

    Attributes:
      state: `TrainState` of shardings; gradients are sharded like the parameters.
      batch: sharding of a micro-batch, one for all leaves or a prefix of its tree; None leaves it as it is.
    """

    state: TrainState
    batch: PyTree = None


Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Mapping[str, ArrayLike]]]


def init_state(params: PyTree, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """The state before the first step, with float32 copies of `params`.

    Under `jax.jit` with `out_shardings` it is created on its devices, and `jax.eval_shape` gives its shapes.
    """
    params = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), key, jnp.zeros((), jnp.int32))


def make_step(
    loss: LossFunction, optimizer: optax.GradientTransformation, *, shardings: Shardings | None = None
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, Metrics]]:
    """The jitted step: (state, fixed, batch) -> (next state, metrics).

    Args:
      loss: loss of one micro-batch; differentiated with respect to its first argument.
      optimizer: optimiser whose state is in `TrainState.optimizer`.
      shardings: shardings of state and batch on a mesh; by default arrays stay where they are.

    The state is donated: its buffers are gone after the call. `fixed` holds arrays that are only read, such as a
    teacher. Leaves of `batch` have an axis of micro-batches before all others.

    Metrics are scalars: "loss", "grad_norm" (before clipping), "learning_rate" of the last update where the optimiser
    keeps it, "skipped" (1 where the step changed nothing) and those of the loss.
    """

    def step(state: TrainState, fixed: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(state.key, state.step)

        def numerator(params: PyTree, part: PyTree, key: Array) -> tuple[Array, Sums]:
            sums = jax.tree.map(_float32, loss(params, fixed, part, key))
            return sums[0], sums

        def accumulate(gradients: PyTree, micro: tuple[PyTree, Array]) -> tuple[PyTree, Sums]:
            part, index = micro
            if shardings is not None and shardings.batch is not None:
                part = jax.lax.with_sharding_constraint(part, shardings.batch)
            key = jax.random.fold_in(step_key, index)
            more, sums = jax.grad(numerator, has_aux=True)(state.params, part, key)
            return _placed(jax.tree.map(lambda x, y: x + _float32(y), gradients, more), shardings), tuple(sums)

        with jax.named_scope("gradients"):
            zeros = _placed(jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), state.params), shardings)
            micro_batches = jax.tree.leaves(batch)[0].shape[0]
            gradients, by_micro = jax.lax.scan(accumulate, zeros, (batch, jnp.arange(micro_batches)))
            total, weight, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), by_micro)

        return update(state, optimizer, gradients, total, weight, sums)

    options = compiler_options()
    if shardings is None:
        return jax.jit(step, donate_argnums=0, compiler_options=options)
    return jax.jit(step, donate_argnums=0, compiler_options=options, out_shardings=(shardings.state, None))


def update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    gradients: PyTree,
    total: Float[Array, ""],
    weight: Float[Array, ""],
    sums: dict[str, Float[Array, ""]],
) -> tuple[TrainState, Metrics]:
    """The next state and the metrics of a step, from sums over its micro-batches.

    Args:
      gradients, total, weight, sums: sums of gradients of numerators, numerators, weights, and metrics times weights.
    """
    with jax.named_scope("update"):
        gradients = jax.tree.map(lambda x: x / weight, gradients)
        mean, norm = total / weight, optax.global_norm(gradients)
        good = jnp.isfinite(mean) & jnp.isfinite(norm)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        changed = (optax.apply_updates(state.params, updates), moments)
        params, moments = jax.tree.map(lambda new, old: jnp.where(good, new, old), changed, state[1:3])
    skipped = jnp.where(good, 0, state.skipped + 1)
    metrics = {name: value / weight for name, value in sums.items()}
    metrics |= {"loss": mean, "grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}
    rate = optax.tree_utils.tree_get(moments, "learning_rate")
    if rate is not None:
        metrics["learning_rate"] = rate
    return TrainState(state.step + 1, params, moments, state.key, skipped), metrics


def _float32(x: ArrayLike) -> Array:
    return jnp.asarray(x, jnp.float32)


def _placed(gradients: PyTree, shardings: Shardings | None) -> PyTree:
    """Accumulated gradients, sharded like the parameters, so that each device holds only its share of them."""
    return gradients if shardings is None else jax.lax.with_sharding_constraint(gradients, shardings.state.params)
