"""A generation engine without values: what its slots hold, and what its programs need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from puzzle_jax.config import ModelConfig
from puzzle_jax.generate import slots as generation
from puzzle_jax.generate.engine import chunk_tokens, group_rows
from puzzle_jax.generate.slots import Admission, Group, Slots, State
from puzzle_jax.model.cache_format import CacheFormat
from puzzle_jax.model.spec import Params
from puzzle_jax.model.stacked import one_layer
from puzzle_jax.plan.abstract import device_bytes, in_place, program_bytes
from puzzle_jax.plan.compilers import compiler
from puzzle_jax.plan.record import Usage


@dataclass(frozen=True)
class AbstractEngine:
    """An `Engine` as far as memory depends on it.

    Attributes:
      slots: requests that run together.
      context: positions of a slot, as `engine.slot_context` rounds them.
      log_probs, experts: whether log-probabilities and expert ids are kept.
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
        """Rows that are prefilled together."""
        parts = 1 if self.mesh is None else self.mesh.shape["data"]
        return group_rows(chunk_tokens(self.context), self.slots, parts)

    @property
    def labels(self) -> dict[str, str]:
        """Readable names of the arrays in `usage`."""
        return {
            "caches": f"caches of {self.slots} slots of {self.context:,}",
            "slots": "their logits and tokens",
            "group": f"{self.rows} rows whose prompts are run",
        }

    def state(self) -> Slots:
        """All slots, without values, sharded as by `slots.empty_slots`."""
        more = {"log_probs": self.log_probs, "experts": self.experts}
        return self._placed(self.slots, partial(generation.empty_slots, **more))

    def group(self) -> Group:
        """The rows that are prefilled together, without values and sharded."""
        return self._placed(self.rows, partial(generation.empty_group, experts=self.experts))

    def usage(self, params: Params) -> Usage:
        """Bytes that generation holds beside `abstract.layer_params`, and temporaries of its largest program."""
        state, group, rows, context = self.state(), self.group(), self.rows, self.context
        entries = (_numbers(), *[_numbers(self.slots)] * (len(Admission._fields) - 1))

        # Prompts are prefilled, admitted to slots, and their answers decoded.
        def prompts(params: Params, *given: Any) -> Group:
            return generation.prefill.function(one_layer(params), self.config, *given, context, None)

        def admission(params: Params, state: Slots, group: Group, entries: Sequence[Array]) -> Slots:
            return generation.admit.__wrapped__(one_layer(params), self.config, state, group, Admission(*entries))  # type: ignore[attr-defined]

        def steps(params: Params, state: Slots, stops: Any, *given: Any) -> Slots:
            run = generation.decode.function
            return run(one_layer(params), self.config, state, stops, 1.0, *given, None, 1.0)

        chunk = (_numbers(rows, chunk_tokens(context)), _numbers(), _numbers(rows))
        programs = {
            prompts: (group, *chunk),
            admission: (state, group, entries),
            steps: (state, _numbers(2), _numbers(), _numbers()),
        }
        caches, slots = device_bytes(state.caches), device_bytes(state._replace(caches=[]))
        beside = [program_bytes(run, params, *given, mesh=self.mesh, donate=1) for run, given in programs.items()]
        return Usage({"caches": caches, "slots": slots, "group": device_bytes(group)}, max(beside))

    def _placed(self, rows: int, empty: Callable[..., State]) -> State:
        """The arrays that `empty` makes for `rows` rows, without values, sharded."""
        shapes = jax.eval_shape(lambda: empty(self.config, rows, self.context, jnp.dtype(compiler().dtype), self.cache))
        if self.mesh is None:
            return shapes
        return in_place(shapes, generation.Places.on(self.mesh, rows, self.config).of(shapes))


def _numbers(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
