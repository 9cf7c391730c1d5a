"""Where parameters live on a mesh: one table from logical axes to mesh axes.

Search and generation use a mesh of "data" (batch) and "model" (heads, experts, vocabulary); training uses one with
"sequence" (positions of a row) between them, which `generation_mesh` converts to the former. A dimension that its mesh
axis does not divide is replicated, so every model runs on every mesh. Meshes use Auto axes: XLA inserts the
collectives, except that attention over sharded positions and the mixture of experts exchange heads and tokens
themselves where a program is traced `on_mesh`; see `kernels.window_attention.parallel` and
`kernels.expert_mlp.parallel`.

What a step reads once, fp32 master weights and optimiser state, is sharded over all devices (FSDP, arXiv 2304.11277)
and gathered by XLA where it is used: see `fully_sharded`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, PyTree

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
    "head_dim": None,
    "router": None,
    "experts": "model",
    "inter": None,
}


TRAINING_AXES: tuple[str, ...] = ("data", "sequence", "model")


def make_mesh(data: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, by default taken from those of all processes.

    Neighbouring devices, within one host, share a model axis, whose collectives are the most frequent.

    Raises ConfigError when there are too few devices, and when a process would be left with none.
    """
    return _mesh({"data": data, "model": model}, devices)


def make_training_mesh(data: int, sequence: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `sequence` x `model` devices; see `make_mesh`."""
    return _mesh(dict(zip(TRAINING_AXES, (data, sequence, model), strict=True)), devices)


def _mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None) -> Mesh:
    devices = jax.devices() if devices is None else devices
    needed, shape = math.prod(sizes.values()), " x ".join(map(str, sizes.values()))
    if min(sizes.values()) < 1 or needed > len(devices):
        raise ConfigError(f"a mesh of {shape} needs {needed} devices, but {len(devices)} are present")
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:needed]}
    if idle:
        raise ConfigError(
            f"a mesh of {shape} takes {needed} of {len(devices)} devices, but must take some of every process: "
            f"process {min(idle)} would have none"
        )
    grid = np.asarray(devices[:needed]).reshape(tuple(sizes.values()))
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def generation_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh as "data" x "model": decoding has rows to shard, but no positions of a row."""
    if mesh.axis_names == ("data", "model"):
        return mesh
    model = mesh.shape["model"]
    return _mesh({"data": mesh.size // model, "model": model}, list(mesh.devices.flat))


def partition(spec: ParamSpec, config: ModelConfig, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of every dimension of one parameter.

    Head axes are only split between heads.
    """
    whole_units = {"heads": config.num_heads, "kv_heads": config.num_kv_heads}
    axes = []
    for name, size in zip(spec.axes, spec.shape, strict=True):
        axis = RULES[name]
        units = whole_units.get(name, size)
        axes.append(axis if axis is not None and units % mesh.shape[axis] == 0 else None)
    return PartitionSpec(*axes)


def shard_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Places parameters on the mesh; packed experts are sharded along the expert axis."""
    return jax.device_put(params, params_sharding(config, mesh))


def params_sharding(config: ModelConfig, mesh: Mesh) -> Params:
    """The sharding in which computation wants parameters: a tree of NamedSharding in the structure of `param_specs`.

    Both arrays of a packed matrix share one: experts are the first axis of packed and of dense matrices, and no other
    axis is sharded.
    """

    def place(spec: ParamSpec) -> NamedSharding:
        axes = partition(spec, config, mesh)
        return NamedSharding(mesh, PartitionSpec(axes[0]) if spec.axes[0] == "experts" else axes)

    return jax.tree.map(place, param_specs(config), is_leaf=is_spec)


def stacked_sharding(params: Params, config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """The sharding in which computation wants stacked layers: the same rules after a first axis that is not sharded.

    Args:
      params: {"embedding", "runs": [[{"attention", "moe"} per position] per run], "final_norm", "head"} of arrays or
        their shapes, every leaf under "runs" with a first axis for the layers that it stacks. Experts may be packed,
        and entries None or missing.

    Returns a tree of NamedSharding, one for each array of `params` and one for both of a packed matrix, as
    `jax.device_put` and the shardings of `jax.jit` take them.
    """
    specs = param_specs(config)

    def place(path: tuple[PyTree, ...], leaf: PyTree) -> NamedSharding:
        first, *rest = (step.key for step in path if isinstance(step, jax.tree_util.DictKey))
        if first != "runs":
            return NamedSharding(mesh, partition(specs[first], config, mesh))
        block, name = rest
        stack = leaf.codes if isinstance(leaf, MXFP4) else leaf
        spec = replace(specs["layers"][0][block][name], shape=stack.shape[1:])
        axes = partition(spec, config, mesh)
        if isinstance(leaf, MXFP4):  # stored as [repeats, experts, outputs, ...]
            axes = axes[:1]
        return NamedSharding(mesh, PartitionSpec(None, *axes))

    return jax.tree_util.tree_map_with_path(place, params, is_leaf=lambda node: isinstance(node, MXFP4))


def fully_sharded(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shards every array over as many devices as divide it: a tree of NamedSharding in the structure of `tree`.

    The largest dimension that the number of devices divides is sharded over all axes; if there is none, axes are spread
    over dimensions to give the most shards. Arrays are replicated over axes that divide no dimension. "model" comes
    first within a dimension: where computation wants that axis alone, the others are gathered by one collective.

    Args:
      tree: arrays or their shapes (`jax.ShapeDtypeStruct`).
    """
    sizes = tuple((axis, mesh.shape[axis]) for axis in reversed(mesh.axis_names) if mesh.shape[axis] > 1)
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _most_cut(tuple(leaf.shape), sizes)), tree)


@lru_cache(maxsize=1024)
def _most_cut(shape: tuple[int, ...], sizes: tuple[tuple[str, int], ...]) -> PartitionSpec:
    """Mesh axes per dimension such that a device holds least; ties go to fewer, then to larger sharded dimensions."""
    best, chosen = (1, 0, 0), PartitionSpec(*[None] * len(shape))
    for places in itertools.product((*range(len(shape)), None), repeat=len(sizes)):
        groups = [[axis for axis, at in zip(sizes, places, strict=True) if at == place] for place in range(len(shape))]
        parts = [math.prod(size for _, size in group) for group in groups]
        if any(size % count for size, count in zip(shape, parts, strict=True)):
            continue
        cut = [size for size, count in zip(shape, parts, strict=True) if count > 1]
        rank = (math.prod(parts), -len(cut), sum(cut))
        if rank > best:
            best, chosen = rank, PartitionSpec(*(tuple(name for name, _ in group) or None for group in groups))
    return chosen


def on_mesh(mesh: Mesh | None) -> AbstractContextManager[object]:
    """A context in which programs spread the mixture's experts, and heads in attention over sharded positions, over the
    mesh; without a mesh it changes nothing.
    """
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def spread_rows(batch: jax.Array | np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A batch that every process holds whole, with its rows sharded over the data axis if that divides them, and
    replicated otherwise; without a mesh, on the first device.
    """
    if mesh is None:
        return jnp.asarray(batch)
    return _placed(batch, batch_sharding(mesh) if batch.shape[0] % mesh.shape["data"] == 0 else _everywhere(mesh))


def replicated(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays that every process holds, replicated on all devices of all processes; without a mesh, as they are."""
    return tree if mesh is None else jax.tree.map(lambda x: _placed(x, _everywhere(mesh)), tree)


def read(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """Reads arrays that live on a mesh, whole, onto the host of every process; all processes must call it."""
    return jax.device_get(arrays if mesh is None else _reader(mesh)(arrays))


@lru_cache(maxsize=8)
def _reader(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda arrays: arrays, out_shardings=_everywhere(mesh))


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _placed(array: ArrayLike, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds, with each device's part placed without communication."""
    return jax.make_array_from_callback(np.shape(array), sharding, np.asarray(array).__getitem__)


def beside(params: Params, state: PyTree, mesh: Mesh | None) -> PyTree:
    """A new state which, without a mesh, is committed to the parameters' device, as the results of programs are.

    Otherwise each program would be compiled twice: for the uncommitted state and for its own, committed result.
    """
    devices = [] if mesh is not None else list(jax.tree.leaves(params)[0].devices())
    return jax.device_put(state, devices[0]) if len(devices) == 1 else state


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [rows, positions] on a training mesh: rows over "data", positions over "sequence"."""
    return NamedSharding(mesh, PartitionSpec("data", "sequence"))
