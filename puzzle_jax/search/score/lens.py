"""A fast first look at alternatives: a linear map per layer in place of the layers above it.

    final state of an alternative = parent's final state + (its state after the layer - the parent's) W,
    W = argmin |Y - X W|^2 + ridge |W|^2,   X states after the layer, Y final states, both less their means

W is fitted to the parent's own activations at the positions before completion tokens (in the spirit of the tuned lens,
arXiv 2303.08112). The score is then the same KL as the exact one, at the cost of one layer and one head per
alternative. It serves to rank alternatives; its absolute value is not reliable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from puzzle_jax.generate.batches import MicroBatch
from puzzle_jax.model.sharding import beside, replicated
from puzzle_jax.search.score.replace_one import METRICS, Alternative, Answers, ReplaceOne

RIDGE = 1e-3
"""The ridge, as a share of the inputs' mean variance."""


@dataclass(frozen=True)
class Lens:
    """Linear maps [layers, hidden, hidden] from each layer's states to the final ones."""

    run: ReplaceOne
    maps: Float[Array, "layers hidden hidden"]

    @property
    def base(self) -> None:
        return None

    @property
    def choices(self) -> Sequence[Alternative]:
        return self.run.choices

    def work(self, wanted: Sequence[tuple[int, Alternative]]) -> int:
        """Number of layers to run, which `on_done` counts up to."""
        return len(wanted)

    def __call__(
        self, batch: MicroBatch, wanted: Sequence[tuple[int, Alternative]], on_done: Callable[[int], None] | None = None
    ) -> Float[np.ndarray, "alternatives rows metrics"]:
        """Estimates METRICS of every trace of a batch under each alternative (layer, choice)."""
        run, answers = self.run, Answers.of(batch)
        values = np.zeros((len(wanted), batch.tokens.shape[0], len(METRICS)))
        for layer, states, after, parent in run.layers(batch):
            here = [number for number, (index, _) in enumerate(wanted) if index == layer]
            for start in range(0, len(here), run.per_call):
                group = here[start : start + run.per_call]
                own = {slot: wanted[number][1] for slot, number in enumerate(group)}
                x = jnp.repeat(after[:, None], run.per_call, axis=1)
                x = through_lens(self.maps[layer], parent, after, run.entered(layer, states, own, x))
                values[group] = run.compared(parent, x, answers)[: len(group)]
                if on_done is not None:
                    on_done(len(group))
        return values


def fit_lens(run: ReplaceOne, batches: Sequence[MicroBatch], on_batch: Callable[[], None] | None = None) -> Lens:
    """Fits one map per layer of the parent, in the memory of two [hidden, hidden] arrays per layer."""
    layers, hidden = run.config.num_layers, run.config.hidden_size
    sums = replicated(beside(run.params, [LensSums.zeros(hidden) for _ in range(layers)], run.mesh), run.mesh)
    for batch in batches:
        answers = Answers.of(batch)
        for layer, _, after, parent in run.layers(batch):
            sums[layer] = add_states(sums[layer], after, parent, answers)
        if on_batch is not None:
            on_batch()
    return Lens(run, jnp.stack([_solve(of_layer) for of_layer in sums]))


class LensSums(NamedTuple):
    """Weighted sums over positions of 1, x, y, x x' and x y'."""

    weight: Float[Array, ""]
    x: Float[Array, "hidden"]
    y: Float[Array, "hidden"]
    xx: Float[Array, "hidden hidden"]
    xy: Float[Array, "hidden hidden"]

    @staticmethod
    def zeros(hidden: int) -> LensSums:
        square = (hidden, hidden)
        return LensSums(jnp.zeros(()), jnp.zeros(hidden), jnp.zeros(hidden), jnp.zeros(square), jnp.zeros(square))


@partial(jax.jit, donate_argnums=0)
def add_states(sums: LensSums, after: Array, final: Array, answers: Answers) -> LensSums:
    x, y = (state.reshape(-1, state.shape[-1])[answers.index].astype(jnp.float32) for state in (after, final))
    weighed = x * answers.weight[:, None]
    return LensSums(
        sums.weight + jnp.sum(answers.weight),
        sums.x + jnp.sum(weighed, axis=0),
        sums.y + answers.weight @ y,
        sums.xx + weighed.T @ x,
        sums.xy + weighed.T @ y,
    )


@jax.jit
def _solve(sums: LensSums) -> Float[Array, "hidden hidden"]:
    mean_x, mean_y = sums.x / sums.weight, sums.y / sums.weight
    square = sums.xx / sums.weight - jnp.outer(mean_x, mean_x)
    cross = sums.xy / sums.weight - jnp.outer(mean_x, mean_y)
    ridge = RIDGE * jnp.trace(square) / square.shape[0]
    return jax.scipy.linalg.solve(square + ridge * jnp.eye(square.shape[0]), cross, assume_a="pos")


@jax.jit
def through_lens(
    lens: Array,
    parent: Float[Array, "rows seq hidden"],
    after: Float[Array, "rows seq hidden"],
    changed: Float[Array, "rows slots seq hidden"],
) -> Float[Array, "rows slots seq hidden"]:
    difference = (changed - after[:, None]).astype(jnp.float32)
    return (parent[:, None] + difference @ lens).astype(parent.dtype)
