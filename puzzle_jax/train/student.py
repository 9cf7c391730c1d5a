"""A child that learns as a view on its parent, so that one copy of the experts serves teacher and student.

    base       the parent's parameters, stacked by runs of equal layers: the teacher, and the student's frozen part
    trained    fp32 master weights of the student's own parameters, in the same structure, with None for frozen ones

Several children of one parent can share a program: layers in which their windows differ are `variable`, and a pass then
takes masks and windows as data (`View`).

By default experts and routers are frozen: they have no master weights, gradients or optimiser state, and the child's
are byte-identical to the parent's. Trainable experts that the checkpoint packs pass through MXFP4 rounding in every
forward pass (`fake_quant`), so that packing them for export loses nothing.

Left out: frozen values of a child's own, since its frozen part is the parent's; and master weights for the kept experts
only: where experts are trained, those that the child lost have master weights, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4, as_dense
from puzzle_jax.kernels.prefix_attention import Layout
from puzzle_jax.model.child import Child, View, delta_leaves, with_delta
from puzzle_jax.model.network import traced_mesh
from puzzle_jax.model.sharding import stacked_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, output_head
from puzzle_jax.model.stacked import (
    VARIABLE,
    Hidden,
    LayerRun,
    StackedMXFP4,
    StaticWindow,
    layer_runs,
    one_layer,
    stack_params,
    stacked_hidden_states,
    unstack_params,
)
from puzzle_jax.train.fake_quant import fake_quantize, is_expert_matrix, round_to_mxfp4
from puzzle_jax.train.losses.head import Head
from puzzle_jax.train.rows import Packed

TRAINABLE = ("router", "experts")
"""Parameters that are frozen unless they are asked for."""

_ENDS = ("embedding", "final_norm", "head")
_ROUTER = ("router_weight", "router_bias")
_EXPERTS = (*EXPERT_MATRICES, "gate_up_bias", "down_bias")

_round = jax.jit(round_to_mxfp4)


@dataclass(frozen=True, eq=False)  # compared by identity: `jax.jit` hashes it, and a delta has no hash
class Student:
    """A child, its parent as its teacher, and the choice of the child's parameters that learn.

    Attributes:
      child: a view; where it has values of its own, master weights start from them.
      trainable: names from `TRAINABLE`.
      remat: whether backward passes recompute every layer from its input.
      ends: whether embedding, final norm and head learn, too.
      dense: whether attention and norms, and the ends if they may, learn; otherwise only what `trainable` names.
      variable: layers whose window a pass takes from the view that it is given.
      packed: whether the child's checkpoint will hold its experts as MXFP4, to which they are then rounded.

    Raises ConfigError for names in `trainable` that are not in `TRAINABLE`, where nothing learns, and for a child with
    values of its own for frozen parameters.
    """

    child: Child
    trainable: tuple[str, ...] = ()
    remat: bool = True
    ends: bool = True
    dense: bool = True
    variable: frozenset[int] = frozenset()
    packed: bool = True

    def __post_init__(self) -> None:
        check_trainable(self.trainable, self.dense)
        self.check_own(".".join(map(str, path)) for path in delta_leaves(self.child.parent, self.child.dense_delta))

    def check_own(self, names: Iterable[str]) -> None:
        """Raises ConfigError where `names`, the tree paths of a child's own values, include frozen parameters."""
        for name in names:
            if not self.learns(own := name.rpartition(".")[2]):
                raise ConfigError(
                    f"the child has values of its own for {name}, trained before, which would be the parent's again "
                    f"where they are frozen; {_mend(own, self.dense)}"
                )

    @property
    def config(self) -> ModelConfig:
        """The configuration that the student runs with: the parent's sizes and the child's rotary settings."""
        return self.child.viewed

    @property
    def teacher_windows(self) -> tuple[int | None, ...]:
        return tuple(block.window for block in self.child.parent.blocks)

    @property
    def windows(self) -> tuple[StaticWindow, ...]:
        return tuple(VARIABLE if i in self.variable else block.window for i, block in enumerate(self.child.blocks))

    @cached_property
    def runs(self) -> tuple[LayerRun, ...]:
        """Runs of layers that are equal in the teacher and in the student, so that one storage serves both."""
        experts = (block.num_experts for block in self.child.parent.blocks)
        return layer_runs(list(zip(experts, self.teacher_windows, self.windows, strict=True)))

    # Parameters ----------------------------------------------------------------------------------------------------

    def stacked(self, parent: Params) -> Params:
        """The parent's parameters, stacked."""
        return stack_params(parent, self.runs)

    def master_weights(self, base: Params, delta: Params | None = None) -> Params:
        """Initial master weights: float32 copies of the parameters that learn.

        Args:
          delta: the child's own values in place of `Child.dense_delta`, so that a compiled program takes them as an
            argument; gigabytes of constants would not fit into one.
        """
        begin, delta = self._learning(base), self.child.dense_delta if delta is None else delta
        if delta is None:
            return _float32(begin)
        # Layer by layer, since a run may hold both layers with values of their own and layers with the parent's.
        return stack_params(_float32(with_delta(unstack_params(begin, self.runs), delta)), self.runs)

    def params(self, base: Params, trained: Params) -> Params:
        """The student's parameters, stacked, in the dtype of `base`; differentiable in `trained`."""
        dtype = base["embedding"].dtype

        def used(path: jax.tree_util.KeyPath, master: Array) -> Array:
            rounds = self.packed and is_expert_matrix(path)
            return (jax.vmap(fake_quantize)(master) if rounds else master).astype(dtype)

        own = jax.tree_util.tree_map_with_path(used, trained)
        if (mesh := traced_mesh()) is not None:
            # Gathers the master weights of all layers at once; otherwise XLA shards activations like the weights.
            own = jax.lax.with_sharding_constraint(own, stacked_sharding(own, self.config, mesh))
        return with_delta(base, own)

    def delta(self, trained: Params) -> Params:
        """Trained values by layer, for `Child.dense_delta` and export; where they are packed, expert matrices lie on
        MXFP4's grid."""

        def exported(path: jax.tree_util.KeyPath, master: Array | np.ndarray) -> np.ndarray:
            if not (self.packed and is_expert_matrix(path)):
                return np.asarray(master)
            return np.stack([np.asarray(_round(jnp.asarray(layer))) for layer in master])  # a layer at a time

        return unstack_params(jax.tree_util.tree_map_with_path(exported, trained), self.runs)

    def _learning(self, tree: PyTree, name: str = "") -> PyTree:
        """The arrays of a tree that learn, by their names, with None in place of the others."""
        if isinstance(tree, dict):
            return {key: self._learning(value, key) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self._learning(value, name) for value in tree]
        return tree if self.learns(name) else None

    def learns(self, name: str) -> bool:
        """Returns whether parameters of this name have master weights; all others stay the parent's."""
        if name in _ENDS:
            return self.ends and self.dense
        if name in _ROUTER:
            return "router" in self.trainable
        return "experts" in self.trainable if name in _EXPERTS else self.dense

    # Passes --------------------------------------------------------------------------------------------------------

    def hidden(
        self,
        base: Params,
        trained: Params,
        batch: Packed,
        *,
        keep_states: bool = False,
        replay: Int[Array, "layers tokens k"] | None = None,
        layout: Layout | None = None,
        view: View | None = None,
    ) -> Hidden:
        """The student's forward pass over [rows, length]; differentiable in `trained`.

        `replay` holds experts to use in place of the routers' choice; its tokens are rows * length. `layout` is the
        layout of rows whose answers share a prompt (`train.grpo.shared_rows`). `view` holds another child's masks and
        windows, which must agree with this child's windows outside the `variable` layers.
        """
        with jax.named_scope("student"):
            params = self.params(base, trained)
            options: dict[str, Any] = {"keep_states": keep_states, "replay": replay, "layout": layout}
            masks = self.masks
            if view is not None:
                masks, options["given_windows"] = view
            return self._pass(
                params, self.config, batch, windows=self.windows, expert_masks=masks, remat=self.remat, **options
            )

    def teacher_hidden(
        self,
        base: Params,
        batch: Packed,
        *,
        keep_states: bool = False,
        replay: Int[Array, "layers tokens k"] | None = None,
        layout: Layout | None = None,
    ) -> Hidden:
        """The parent's forward pass, through which no gradient flows."""
        with jax.named_scope("teacher"):
            options = {"keep_states": keep_states, "replay": replay, "layout": layout}
            parent = self.child.parent
            return jax.lax.stop_gradient(self._pass(base, parent, batch, windows=self.teacher_windows, **options))

    @property
    def masks(self) -> Bool[Array, "layers experts"]:
        """Masks of the parent's experts that each layer keeps, [layers, experts]."""
        return self.child.view.expert_masks

    def _pass(self, params: Params, config: ModelConfig, batch: Packed, **options: Any) -> Hidden:
        return stacked_hidden_states(
            params,
            config,
            self.runs,
            jnp.asarray(batch.tokens),
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
            **options,
        )


def check_trainable(names: Sequence[str], dense: bool = True, where: str = "") -> None:
    """Raises ConfigError for a name that is not in `TRAINABLE`, and where neither names nor dense parameters learn.

    `where` is the section of the settings, such as "finalists.".
    """
    for name in names:
        if name not in TRAINABLE:
            raise ConfigError(f"{where}train has {name!r}, but must be of {', '.join(TRAINABLE)}")
    if not names and not dense:
        raise ConfigError(f"{where}dense is false and {where}train is empty, but something has to learn; name router")


def head_of(params: Params) -> Head:
    """Final norm and output head of a model."""
    return Head(params["final_norm"], output_head(params))


def _float32(tree: Params) -> Params:
    """Dense float32 copies of all arrays: they are donated to every step, and the base parameters must outlive them."""

    def copy(node: Array | np.ndarray | MXFP4 | StackedMXFP4) -> Array:
        if isinstance(node, StackedMXFP4):
            return jax.lax.map(lambda packed: as_dense(one_layer(packed), jnp.float32), node)
        return as_dense(node, jnp.float32) if isinstance(node, MXFP4) else jnp.array(node, jnp.float32)

    return jax.tree.map(copy, tree, is_leaf=lambda node: isinstance(node, (MXFP4, StackedMXFP4)))


def _mend(name: str, dense: bool) -> str:
    """Advice, for a message, on how to keep a child's own values of this name."""
    if name not in (*_ROUTER, *_EXPERTS):
        return "train it as a whole, not its blocks" if dense else "set dense to true"
    return f"name {'router' if name in _ROUTER else 'experts'} in train"
