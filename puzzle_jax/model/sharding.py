"""Where parameters live on a mesh: one table from logical axes to mesh axes.

Mesh axes are "data" (batch) and "model" (heads, experts, vocabulary). A dimension that its mesh axis does not divide
is replicated, so that every model runs on every mesh. Meshes use Auto axes: XLA inserts the collectives, but for the
mixture of experts, which exchanges tokens by itself where a program is traced `on_mesh`; see
`kernels.expert_mlp.parallel`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.model.spec import Params, ParamSpec, is_spec, param_specs

RULES: Mapping[str, str | None] = {
    "vocab": "model",
    "hidden": None,
    "heads": "model",
    "kv_heads": "model",
    "sinks": "model",
    "router": None,
    "experts": "model",
    "inter": None,
}


def make_mesh(data: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, by default of this process's.

    Raises ConfigError when there are fewer devices.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    if data < 1 or model < 1 or data * model > len(devices):
        raise ConfigError(f"a mesh of {data} x {model} needs {data * model} devices, but {len(devices)} are present")
    grid = np.asarray(devices[: data * model]).reshape(data, model)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def partition(spec: ParamSpec, config: ModelConfig, mesh: Mesh) -> PartitionSpec:
    """The mesh axis of every dimension of one parameter.

    Head axes are only cut between heads.
    """
    whole_units = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    axes = []
    for name, size in zip(spec.axes, spec.shape, strict=True):
        axis = RULES[name]
        units = whole_units.get(name, size)
        axes.append(axis if axis is not None and units % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def shard_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Places parameters on the mesh; packed experts are cut along the expert axis."""

    def place(spec: ParamSpec, value: jax.Array | MXFP4) -> jax.Array | MXFP4:
        axes = partition(spec, config, mesh)
        if isinstance(value, MXFP4):  # stored as [experts, outputs, ...]
            experts = NamedSharding(mesh, PartitionSpec(axes[0]))
            return MXFP4(jax.device_put(value.codes, experts), jax.device_put(value.scales, experts))
        return jax.device_put(value, NamedSharding(mesh, axes))

    return jax.tree.map(place, param_specs(config), params, is_leaf=is_spec)


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Within, programs spread the mixture's experts over the mesh; without a mesh, nothing is different."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))
