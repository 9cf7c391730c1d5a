"""How a model's weights are held: experts packed (MXFP4) as checkpoints store them, or decoded to dense matrices.

    packed    experts as stored, and matrices that are stored in bfloat16 likewise, each cast where it is used; kernels
              read packed experts, and elsewhere the chosen ones are decoded one at a time
    dense     everything in the compute dtype
    auto      dense where a device's memory holds that twice, so that as much again is left for caches and activations;
              packed where it does not

Dense matrices need no decoding, so they are faster wherever the time goes into arithmetic; packed ones are a quarter of
the bytes (an eighth on CPUs, which compute in float32).
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from puzzle_jax.config import ModelConfig
from puzzle_jax.errors import ConfigError, check_choice
from puzzle_jax.kernels.mxfp4 import GROUP
from puzzle_jax.model.sharding import partition
from puzzle_jax.model.spec import EXPERT_MATRICES, ParamSpec, is_spec, param_specs

WEIGHTS = ("auto", "packed", "dense")

_ROOM = 2  # times the dense weights, the memory that "auto" needs to choose them

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_weights(value: str) -> None:
    """Raises ConfigError for a setting that is none of `WEIGHTS`."""
    check_choice("weights", value, WEIGHTS)


def check_stored(weights: str, packed: bool) -> None:
    """Raises ConfigError where packed experts are asked for and the checkpoint has none."""
    check_weights(weights)
    if weights == "packed" and not packed:
        raise ConfigError("weights is packed, but the checkpoint's experts are not stored as MXFP4; take auto or dense")


def stays_packed(
    weights: str,
    config: ModelConfig,
    packed: bool,
    *,
    dtype: DTypeLike,
    mesh: Mesh | AbstractMesh | None = None,
    memory: int | None = None,
) -> bool:
    """Returns whether the experts stay packed (MXFP4) in memory.

    Args:
      weights: one of `WEIGHTS`.
      packed: whether the checkpoint stores them so.
      dtype: the compute dtype.
      mesh: devices that the model is sharded over.
      memory: bytes of memory of a device; by default those of the first device of this process.

    Raises ConfigError where packed experts are asked for and the checkpoint has none.
    """
    check_stored(weights, packed)
    if weights != "auto" or not packed:
        return weights == "packed"
    return _ROOM * weight_bytes(config, dtype, mesh) > (device_memory() if memory is None else memory)


@lru_cache(maxsize=64)  # a plan asks for the same ones thousands of times
def weight_bytes(
    config: ModelConfig, dtype: DTypeLike, mesh: Mesh | AbstractMesh | None = None, *, packed: bool = False
) -> int:
    """Bytes of parameters that one device holds, experts dense or packed."""
    width = jax.numpy.dtype(dtype).itemsize

    def size(path: jax.tree_util.KeyPath, spec: ParamSpec) -> int:
        parts = () if mesh is None else [mesh.shape[axis] for axis in partition(spec, config, mesh) if axis is not None]
        numbers = math.prod(spec.shape) // math.prod(parts)
        matrix = path[-1].key in EXPERT_MATRICES  # pyright: ignore[reportAttributeAccessIssue]
        return numbers // 2 + numbers // GROUP if packed and matrix else numbers * width

    sizes = jax.tree_util.tree_map_with_path(size, param_specs(config), is_leaf=is_spec)
    return sum(jax.tree.leaves(sizes))


def device_memory() -> int:
    """Bytes that programs may use on the first device of this process; a CPU's devices share the host's memory
    evenly."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return host_memory() // jax.local_device_count(device.platform)


def host_memory() -> int:
    """Bytes of memory of this host, or of the container that the process is in, where that has fewer."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [path.read_text().strip() for path in _CGROUP_LIMITS if path.is_file()]
    return min([total, *(int(limit) for limit in limits if limit.isdecimal())])
