"""Placement of training's arrays, on a mesh or without one: base parameters, master weights with the optimiser's state,
and batches.

    base parameters       sharded over "model" (heads, experts, vocabulary), as computation needs them
    fp32 master weights   fully sharded over all axes, like the optimiser's moments; gathered where they are used
    batches               rows over "data", positions over "sequence"

Every process holds the whole batch of a step (`traces.batches`) and gives its devices their part.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.model.sharding import fully_sharded, stacked_sharding
from puzzle_jax.model.spec import Params


@dataclass(frozen=True)
class Placement:
    """Places training's arrays on devices.

    Attributes:
      mesh: mesh with axes "data", "sequence" and "model"; None means the first device.
    """

    mesh: Mesh | None = None

    def base(self, params: Params, config: ModelConfig) -> Params:
        """Shards a model's stacked parameters; returns them unchanged without a mesh."""
        return params if self.mesh is None else jax.device_put(params, stacked_sharding(params, config, self.mesh))

    def master_weights(self, tree: PyTree) -> PyTree:
        """Shardings of master weights, or of a state that contains them; None without a mesh."""
        return None if self.mesh is None else fully_sharded(tree, self.mesh)

    def parts(self, tree: PyTree) -> PyTree:
        """Shards arrays that every process holds whole on its host as master weights of their shapes are."""
        if self.mesh is None:
            return tree
        return jax.tree.map(_part, tree, self.master_weights(tree))

    def rows(self, batch: PyTree) -> PyTree:
        """Places a batch of arrays [rows, length, ...]."""
        return self._cut(batch, PartitionSpec("data", "sequence"))

    def micro_batches(self, batch: PyTree) -> PyTree:
        """Places a batch of arrays [micro_batches, rows, length, ...]."""
        return self._cut(batch, PartitionSpec(None, "data", "sequence"))

    def _cut(self, batch: PyTree, axes: PartitionSpec) -> PyTree:
        if self.mesh is None:
            return batch
        sharding = NamedSharding(self.mesh, axes)
        return jax.tree.map(lambda array: _part(array, sharding), batch)


def on_host(tree: PyTree) -> PyTree:
    """Gathers whole arrays on the host of every process, one after the other."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: np.asarray(multihost_utils.process_allgather(leaf, tiled=True)), tree)


def _part(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
