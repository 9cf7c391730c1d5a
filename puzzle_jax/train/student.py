"""A child that learns as a view on its resident parent: one copy of the experts serves teacher and student.

    resident   the parent's parameters, stacked by runs of equal layers: what the teacher reads, and the student's frozen part
    trained    float32 masters of what the student has of its own, in the same structure, None for all that is frozen

By default experts and routers are frozen: they have no masters, no gradients and no optimiser state, and the child's are
the parent's to the byte. Freed experts pass through MXFP4 rounding in every forward pass (`fake_quant`), so that packing
them for export loses nothing.

Left out: masters of kept experts alone; freed experts have masters for those that the child lost, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import as_dense
from puzzle_jax.model.child import Child, with_delta
from puzzle_jax.model.spec import EXPERT_MATRICES, Params
from puzzle_jax.model.stacked import (
    Hidden,
    LayerRun,
    StackedMXFP4,
    layer_runs,
    one_layer,
    stack_params,
    stacked_hidden_states,
    unstack_params,
)
from puzzle_jax.train.fake_quant import fake_quantize, round_to_mxfp4
from puzzle_jax.train.head_losses import Head
from puzzle_jax.train.rows import Packed

FREED = ("router", "experts")
"""What is frozen unless it is asked for."""

_ENDS = ("embedding", "final_norm", "head")
_ROUTER = ("router_weight", "router_bias")
_EXPERTS = (*EXPERT_MATRICES, "gate_up_bias", "down_bias")


@dataclass(frozen=True)
class Student:
    """A child, its parent as its teacher, and what of the child learns.

    Attributes:
      child: a view; its trained values, where it has any, are where the masters begin.
      freed: of `FREED`.
      remat: backward passes compute every layer once more from its input.
      ends: whether embedding, final norm and head learn, too.

    Raises ConfigError for names in `freed` that are none of `FREED`.
    """

    child: Child
    freed: tuple[str, ...] = ()
    remat: bool = True
    ends: bool = True

    def __post_init__(self) -> None:
        for name in self.freed:
            if name not in FREED:
                raise ConfigError(f"train has {name!r}, but must be of {', '.join(FREED)}")

    @property
    def config(self) -> ModelConfig:
        return self.child.viewed

    @property
    def teacher_windows(self) -> tuple[int | None, ...]:
        return tuple(block.window for block in self.child.parent.blocks)

    @property
    def windows(self) -> tuple[int | None, ...]:
        return tuple(block.window for block in self.child.blocks)

    @cached_property
    def runs(self) -> tuple[LayerRun, ...]:
        """Runs of layers that are equal in the teacher and in the student, so that one storage serves both."""
        experts = (block.num_experts for block in self.child.parent.blocks)
        return layer_runs(list(zip(experts, self.teacher_windows, self.windows, strict=True)))

    # Parameters ----------------------------------------------------------------------------------------------------

    def resident(self, parent: Params) -> Params:
        """The parent's parameters, stacked."""
        return stack_params(parent, self.runs)

    def masters(self, resident: Params) -> Params:
        """Where training begins: float32 copies of what learns."""
        begin = resident
        if self.child.dense_delta is not None:
            begin = with_delta(resident, stack_params(self.child.dense_delta, self.runs))
        return _own(begin, self._learns)

    def params(self, resident: Params, trained: Params) -> Params:
        """The student's parameters in the resident's dtype."""
        dtype = resident["embedding"].dtype
        return with_delta(
            resident, jax.tree_util.tree_map_with_path(lambda path, x: _used(path, x).astype(dtype), trained)
        )

    def delta(self, trained: Params) -> Params:
        """Trained values by layer, for `Child.dense_delta` and export; expert matrices lie on MXFP4's grid."""
        rounded = jax.tree_util.tree_map_with_path(lambda path, x: _rounded(path, np.asarray(x)), trained)
        return unstack_params(rounded, self.runs)

    def _learns(self, name: str) -> bool:
        if name in _ENDS:
            return self.ends
        if name in _ROUTER:
            return "router" in self.freed
        return "experts" in self.freed if name in _EXPERTS else True

    # Passes --------------------------------------------------------------------------------------------------------

    def hidden(self, resident: Params, trained: Params, batch: Packed, *, keep_states: bool = False) -> Hidden:
        """The student's pass over [rows, length]; differentiable in `trained`."""
        with jax.named_scope("student"):
            return self._pass(
                self.params(resident, trained), self.config, self.windows, batch, keep_states, self.masks, self.remat
            )

    def teacher_hidden(self, resident: Params, batch: Packed, *, keep_states: bool = False) -> Hidden:
        """The parent's pass."""
        with jax.named_scope("teacher"):
            return jax.lax.stop_gradient(
                self._pass(resident, self.child.parent, self.teacher_windows, batch, keep_states, None, False)
            )

    @property
    def masks(self) -> Array:
        """Which of the parent's experts each layer keeps, [layers, experts]."""
        return self.child.view.expert_masks

    def _pass(
        self,
        params: Params,
        config: ModelConfig,
        windows: tuple[int | None, ...],
        batch: Packed,
        keep_states: bool,
        masks: Array | None,
        remat: bool,
    ) -> Hidden:
        return stacked_hidden_states(
            params,
            config,
            self.runs,
            jnp.asarray(batch.tokens),
            windows=windows,
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
            expert_masks=masks,
            remat=remat,
            keep_states=keep_states,
        )


def head_of(params: Params) -> Head:
    """Final norm and output head of a model."""
    return Head(params["final_norm"], params["head"])


def _own(tree: Any, learns: Any, name: str = "") -> Any:
    """Float32 copies of the arrays whose names `learns` takes, None in place of the others."""
    if isinstance(tree, dict):
        return {key: _own(value, learns, key) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_own(value, learns, name) for value in tree]
    if not learns(name):
        return None
    if isinstance(tree, StackedMXFP4):
        return jax.lax.map(lambda packed: as_dense(one_layer(packed), jnp.float32), tree)
    return jnp.array(tree, jnp.float32)  # a copy, since masters are given away to every step


def _is_expert_matrix(path: tuple[Any, ...]) -> bool:
    return path[-1].key in EXPERT_MATRICES


def _used(path: tuple[Any, ...], master: Array) -> Array:
    return jax.vmap(fake_quantize)(master) if _is_expert_matrix(path) else master


def _rounded(path: tuple[Any, ...], master: np.ndarray) -> np.ndarray:
    if not _is_expert_matrix(path):
        return master
    return np.stack([np.asarray(round_to_mxfp4(jnp.asarray(layer))) for layer in master])


def flat_tokens(batch: Packed) -> tuple[Int[Array, "tokens"], Array]:
    """Targets and weights of all positions in one row."""
    return jnp.asarray(batch.targets).reshape(-1), jnp.asarray(batch.weights).reshape(-1)
