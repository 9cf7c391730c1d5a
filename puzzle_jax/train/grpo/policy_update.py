"""One update of a policy from as many micro-batches as its answers fill.

The number of rows that answers fill is known only once they are sampled. So micro-batches are a loop on the host here,
not a scan: one compiled program per shape serves any number of them. Sums are accumulated in float32 on the devices,
and the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered, Wrapped
from jaxtyping import Array, Float, PyTree

from puzzle_jax.model.schedule import compiler_options
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.train.distill.objectives import Fixed
from puzzle_jax.train.grpo.policy import MAXIMUM, Policy, Scores
from puzzle_jax.train.rows import Packed
from puzzle_jax.train.step import Metrics, Shardings, TrainState, update


class Sums(NamedTuple):
    """Sums over micro-batches of gradients, losses times coefficients, shares, and metrics times shares (maxima where
    their names end in `MAXIMUM`)."""

    gradients: PyTree
    total: Float[Array, ""]
    weight: Float[Array, ""]
    terms: dict[str, Float[Array, ""]]


@dataclass(frozen=True, eq=False)
class PolicyUpdate:
    """The compiled programs of an update; `shardings` are those of the state on the mesh."""

    policy: Policy
    optimizer: optax.GradientTransformation
    shardings: Shardings | None = None
    mesh: Mesh | None = None

    def __call__(self, state: TrainState, fixed: Fixed, batches: Iterable[Packed]) -> tuple[TrainState, Metrics]:
        """The next state, and means over tokens; the state is donated. At least one micro-batch is required."""
        sums: Sums | None = None
        with on_mesh(self.mesh):
            for batch in batches:
                sums = self._zeros(state.params, fixed, batch) if sums is None else sums
                sums = self._accumulate(sums, state.params, fixed, batch)
            assert sums is not None, "an update needs a micro-batch"
            return self._apply(state, sums)

    def score(self, params: PyTree, fixed: Fixed, batch: Packed, *, old: bool, reference: bool) -> Scores:
        """See `Policy.score`."""
        with on_mesh(self.mesh):
            return self._score(params, fixed, batch, old=old, reference=reference)

    def lowered(self, state: PyTree, fixed: PyTree, batch: PyTree) -> tuple[PyTree, Lowered, Lowered]:
        """Sums as `jax.ShapeDtypeStruct`s, and the lowered programs that add to them and apply them."""
        with on_mesh(self.mesh):
            sums = self._sums_in_place(state.params, fixed, batch)
            return sums, self._accumulate.lower(sums, state.params, fixed, batch), self._apply.lower(state, sums)

    def lowered_score(self, params: PyTree, fixed: PyTree, batch: PyTree, *, old: bool, reference: bool) -> Lowered:
        """The lowered program of `score`."""
        with on_mesh(self.mesh):
            return self._score.lower(params, fixed, batch, old=old, reference=reference)

    def _sums(self, params: PyTree, fixed: Fixed, batch: Packed) -> Sums:
        """The sums of one micro-batch."""

        def numerator(params: PyTree) -> tuple[Array, PyTree]:
            loss = self.policy(params, fixed, batch)
            return loss.total.astype(jnp.float32), loss

        gradients, loss = jax.grad(numerator, has_aux=True)(params)
        return Sums(jax.tree.map(lambda x: x.astype(jnp.float32), gradients), *loss)

    def _sums_in_place(self, params: PyTree, fixed: PyTree, batch: PyTree) -> PyTree:
        """`Sums` of `jax.ShapeDtypeStruct`s in float32; gradients are sharded like the parameters."""
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), jax.eval_shape(self._sums, params, fixed, batch)
        )
        if self.shardings is None:
            return shapes

        def placed(leaf: PyTree, sharding: PyTree) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return shapes._replace(gradients=jax.tree.map(placed, shapes.gradients, self.shardings.state.params))

    @property
    def _sums_shardings(self) -> Sums | None:
        """Shardings of the sums on a mesh; None without one."""
        if self.shardings is None or self.mesh is None:
            return None
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return Sums(self.shardings.state.params, everywhere, everywhere, everywhere)  # type: ignore[arg-type]

    @cached_property
    def _zeros(self) -> Wrapped:
        """Makes sums of 0, placed like the results of `_accumulate`, which is recompiled for any other placement.

        Without a mesh, jit commits its results to a device only if an argument is, so unused arguments must be kept.
        """

        def zeros(params: PyTree, fixed: Fixed, batch: Packed) -> Sums:
            shapes = jax.eval_shape(self._sums, params, fixed, batch)
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

        return jax.jit(zeros, keep_unused=True, out_shardings=self._sums_shardings)

    @cached_property
    def _accumulate(self) -> Wrapped:
        def accumulate(before: Sums, params: PyTree, fixed: Fixed, batch: Packed) -> Sums:
            here = self._sums(params, fixed, batch)
            sums = jax.tree.map(lambda x, y: x + jnp.asarray(y, jnp.float32), before, here)
            for name in sums.terms:
                if name.endswith(MAXIMUM):
                    sums.terms[name] = jnp.maximum(before.terms[name], here.terms[name])
            return sums

        options = compiler_options()
        return jax.jit(accumulate, donate_argnums=0, compiler_options=options, out_shardings=self._sums_shardings)

    @cached_property
    def _apply(self) -> Wrapped:
        def apply(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
            largest = {name: value for name, value in sums.terms.items() if name.endswith(MAXIMUM)}
            state, metrics = update(state, self.optimizer, *sums)
            return state, metrics | largest

        if self.shardings is None:
            return jax.jit(apply, donate_argnums=0)
        return jax.jit(apply, donate_argnums=0, out_shardings=(self.shardings.state, None))

    @cached_property
    def _score(self) -> Wrapped:
        return jax.jit(self.policy.score, static_argnames=("old", "reference"))
