"""Import of checkpoints: a directory in, a configuration and a parameter tree out, sharded over a mesh.

Tensors are read one after the other; each process reads only the blocks that its devices hold. They are put on the
devices and brought into our orientation and type there by a jitted program that donates its input where it can, so that
host memory holds the process's share and about one tensor more. Packed experts stay packed unless dense ones are
requested, which are decoded matrix by matrix; matrices in FP8 are decoded as they are read. Other tensors may be stored
in BF16, F16 or F32. All become `dtype`.

Left out: downloading, pickled weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.describe import PROVENANCE, Description, describe_checkpoint
from puzzle_jax.convert_hf.kv_scales import StoredScales
from puzzle_jax.convert_hf.table import Form, ParamPath, TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors.composed import ScaledTensor, StackedExperts
from puzzle_jax.convert_hf.tensors.files import Stored
from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import Json, read_object
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from puzzle_jax.model.cache_format import KVScales
from puzzle_jax.model.network import compute_dtype
from puzzle_jax.model.sharding import partition
from puzzle_jax.model.spec import Params, ParamSpec, param_specs, subtree
from puzzle_jax.model.weights import stays_packed


@dataclass(frozen=True)
class Checkpoint:
    """A model read from a directory; `params` have the structure of `model.spec`, the rest is its `Description`'s."""

    config: ModelConfig
    params: Params
    form: Form
    directory: Path
    config_json: dict[str, Json]
    kv_scales: KVScales | None = None


def load_checkpoint(
    directory: Path | str,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    experts: Literal["stored", "dense"] = "stored",
    narrow: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Checkpoint:
    """Reads a checkpoint of one of the families of `configuration.config_json`.

    Args:
      directory: holds config.json and model.safetensors, or shards with an index.
      dtype: type of every array but packed experts.
      mesh: the mesh that `model.sharding` spreads parameters over; by default all go to the first device.
      experts: "dense" decodes packed experts to `dtype`, layer by layer.
      narrow: keeps matrices of fewer bits than `dtype` as they are stored; each is cast where it is used.
      on_tensor: called with the name and stored bytes of every tensor that is in place.

    Raises `CheckpointError` with everything that is wrong in one message.
    """
    description = describe_checkpoint(directory)
    table = checkpoint_tensors(description.config, description.form)
    return Checkpoint(
        description.config,
        load_tensors(description, table, dtype=dtype, mesh=mesh, experts=experts, narrow=narrow, on_tensor=on_tensor),
        description.form,
        description.directory,
        description.config_json,
        cache_scales(description),
    )


def load_weights(description: Description, mesh: Mesh | None = None, weights: str = "auto") -> Params:
    """A checkpoint's weights as models run with them: for `compute_dtype`, packed or dense as `model.weights` decides.

    Every tensor is brought directly into its final form and place.
    """
    config, dtype = description.config, compute_dtype()
    packed = stays_packed(weights, config, description.form == "mxfp4", dtype=dtype, mesh=mesh)
    table = checkpoint_tensors(config, description.form)
    experts = "stored" if packed else "dense"
    return load_tensors(description, table, dtype=dtype, mesh=mesh, experts=experts, narrow=packed)


def load_tensors(
    description: Description,
    table: Sequence[TensorSpec],
    *,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    experts: Literal["stored", "dense"] = "stored",
    narrow: bool = False,
    on_tensor: Callable[[str, int], None] | None = None,
) -> Params:
    """The parameter tree with only the tensors of `table`, a part of all; options as in `load_checkpoint`."""
    config, dtype = description.config, jnp.dtype(dtype)
    specs = param_specs(config)
    leaves: dict[ParamPath, PyTree] = {}
    for spec in table:
        stored = description.tensors[spec.name]
        param = subtree(specs, spec.parameter)
        leaves[spec.path] = _placed(stored, spec, param, config, mesh, dtype, narrow and len(param.shape) > 1)
        if spec.path[-1] == "scales":
            stem = spec.path[:-1]
            leaves[stem] = MXFP4(leaves.pop((*stem, "blocks")), leaves.pop(spec.path))
            if experts == "dense":
                leaves[stem] = _decoder(dtype, _final(param, config, mesh))(leaves[stem])
        if on_tensor is not None:
            on_tensor(spec.name, stored.nbytes)
    return build_params(config, leaves)


def cache_scales(description: Description) -> KVScales | None:
    """The scales of a checkpoint's FP8 cache, as JAX arrays; None where it has none."""
    scales = known_scales(description)
    return None if scales is None else KVScales(*map(jnp.asarray, scales))


def known_scales(description: Description) -> StoredScales | None:
    """The scales of an FP8 cache that a checkpoint carries, or that its record holds, as where it carries none for its
    plain model type. Raises PuzzleError where the record holds something else."""
    path = description.directory / PROVENANCE
    if description.kv_scales is not None or not path.is_file():
        return description.kv_scales
    recorded = read_object(path).get("kv_scales")
    if recorded is None:
        return None
    try:
        scales = np.asarray([recorded[kind] for kind in "kv"], np.float32)
    except (KeyError, TypeError, ValueError):
        scales = np.zeros(0, np.float32)
    if scales.shape != (2, description.config.num_layers) or not (np.isfinite(scales) & (scales > 0)).all():
        raise PuzzleError(f"{path}: kv_scales must hold one number per layer for k and v")
    return scales


def build_params(config: ModelConfig, leaves: Mapping[ParamPath, PyTree]) -> Params:
    """The parameter tree with these leaves at their paths."""
    params: Params = {"layers": [{"attention": {}, "moe": {}} for _ in config.blocks]}
    for path, leaf in leaves.items():
        subtree(params, path[:-1])[path[-1]] = leaf
    return params


def _final(param: ParamSpec, config: ModelConfig, mesh: Mesh | None, packed: bool = False) -> Sharding:
    """The sharding that computation expects of a parameter, or of each array of a packed one."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    axes = partition(param, config, mesh)
    return NamedSharding(mesh, PartitionSpec(axes[0]) if packed else axes)


def _placed(
    stored: Stored,
    spec: TensorSpec,
    param: ParamSpec,
    config: ModelConfig,
    mesh: Mesh | None,
    dtype: jnp.dtype,
    narrow: bool,
) -> jax.Array:
    """A tensor on its devices, in our orientation and type."""
    if dtype == jnp.bfloat16 and isinstance(stored, ScaledTensor | StackedExperts):
        stored = stored.rounded()
    packed = spec.dtype == "U8"
    final = at_rest = _final(param, config, mesh, packed)
    if isinstance(final, NamedSharding) and spec.transposed:
        at_rest = NamedSharding(final.mesh, PartitionSpec(*final.spec[::-1]))

    # Packed codes lose their last axis: see `kernels.mxfp4`.
    codes = spec.path[-1] == "blocks"
    shape = (*spec.shape[:2], spec.shape[2] * spec.shape[3]) if codes else spec.shape

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        if codes:
            block = stored.read((index or ())[:2])
            return block.reshape(*block.shape[:2], -1)
        return stored.read(index or (), weights=True)

    array = jax.make_array_from_callback(shape, at_rest, read)
    if narrow and array.dtype.itemsize < dtype.itemsize:
        dtype = array.dtype
    if packed or (not spec.transposed and array.dtype == dtype):
        return array
    with warnings.catch_warnings():  # only arrays of the same size can be reused in place; the others are just released
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return jax.block_until_ready(_converter(spec.transposed, dtype, final)(array))


@lru_cache(maxsize=64)
def _converter(transposed: bool, dtype: jnp.dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """One program for all tensors of a shape."""

    def convert(array: jax.Array) -> jax.Array:
        return (array.T if transposed else array).astype(dtype)

    # On a CPU the input is the memory that was read into, which JAX would copy before it may be donated.
    donated = () if jax.default_backend() == "cpu" else (0,)
    return jax.jit(convert, donate_argnums=donated, out_shardings=sharding)


@lru_cache(maxsize=64)
def _decoder(dtype: jnp.dtype, sharding: Sharding) -> Callable[[MXFP4], jax.Array]:
    """One program for all packed matrices of a shape."""
    return jax.jit(lambda packed: decode(packed, dtype), out_shardings=sharding)
