"""A generation engine without values: what its slots hold, and its programs, for plans of memory (`plan.programs`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate.engine import chunk_tokens, group_rows
from puzzle_jax.generate.sampling import Sampling
from puzzle_jax.generate.slots import (
    Admission,
    Group,
    Places,
    Slots,
    State,
    admit,
    decode,
    empty_group,
    empty_slots,
    prefill,
)
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import StackedMXFP4, one_layer
from puzzle_jax.plan.programs import DTYPE, in_place, kernel_shapes


@dataclass(frozen=True)
class AbstractEngine:
    """An `Engine` as far as memory depends on it.

    Attributes:
      config: of the model.
      slots: requests that run together.
      context: positions of a slot, as `engine.slot_context` rounds them.
      cache: how keys and values are kept.
      mesh: of "data" and "model".
      log_probs, experts: whether they are kept.
    """

    config: ModelConfig
    slots: int
    context: int
    cache: CacheFormat
    mesh: Mesh | None = None
    log_probs: bool = False
    experts: bool = False

    @property
    def rows(self) -> int:
        """Whose prompts are run together."""
        parts = 1 if self.mesh is None else self.mesh.shape["data"]
        return group_rows(chunk_tokens(self.context), self.slots, parts)

    def state(self) -> Slots:
        """All slots, where `slots.empty_slots` makes them."""

        def empty() -> Slots:
            return empty_slots(
                self.config,
                self.slots,
                self.context,
                jnp.dtype(DTYPE),
                self.cache,
                log_probs=self.log_probs,
                experts=self.experts,
            )

        return self._placed(self.slots, empty)

    def group(self) -> Group:
        """Rows whose prompts are run together, likewise."""

        def empty() -> Group:
            dtype = jnp.dtype(DTYPE)
            return empty_group(self.config, self.rows, self.context, dtype, self.cache, experts=self.experts)

        return self._placed(self.rows, empty)

    def lowered(self, params: Params) -> list[Any]:
        """The programs: prompts are run, slots are given, answers are decoded.

        Args:
          params: without values, in place; packed experts as `StackedMXFP4` (`without_values`).
        """
        config, context, chunk = self.config, self.context, chunk_tokens(self.context)

        # Functions of their own, so that no program of an engine's, traced before or later, is taken for one of these.
        def prompts(params: Params, group: Group, tokens: Any, start: Any, lengths: Any) -> Group:
            return prefill.__wrapped__(one_layer(params), config, group, tokens, start, lengths, context, None)  # type: ignore[attr-defined]

        def given(params: Params, state: Slots, group: Group, admission: Any) -> Slots:
            return admit.__wrapped__(one_layer(params), config, state, group, Admission(*admission))  # type: ignore[attr-defined]

        def steps(params: Params, state: Slots, stops: Any, steps: Any, idle: Any) -> Slots:
            return decode.__wrapped__(one_layer(params), config, state, stops, Sampling(1.0), steps, idle, None)  # type: ignore[attr-defined]

        def numbers(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        state, group, rows = self.state(), self.group(), self.rows
        entries = (numbers(), *[numbers(self.slots)] * (len(Admission._fields) - 1))
        with on_mesh(self.mesh), kernel_shapes():
            return [
                jax.jit(prompts, donate_argnums=1).lower(params, group, numbers(rows, chunk), numbers(), numbers(rows)),
                jax.jit(given, donate_argnums=1).lower(params, state, group, entries),
                jax.jit(steps, donate_argnums=1).lower(params, state, numbers(2), numbers(), numbers()),
            ]

    def _placed(self, rows: int, empty: Callable[[], State]) -> State:
        """What `empty` makes of so many rows, without values, in place."""
        shapes = jax.eval_shape(empty)
        if self.mesh is None:
            return shapes
        return in_place(shapes, Places.on(self.mesh, rows, self.config).of(shapes))


def without_values(node: Any) -> Any:
    """A packed matrix in a form that takes what has no values; anything else as it is."""
    return StackedMXFP4(node.codes, node.scales) if isinstance(node, MXFP4) else node
