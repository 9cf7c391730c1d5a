"""Compiles programs for devices that are not there, with arrays without values and virtual devices.

A program is traced with arrays that have shapes, dtypes and shardings on a mesh, but no values, and compiled for
virtual devices. The bytes of its arguments are exact. Temporaries are what the compiler in force (`plan.compilers`)
allocates; another compiler orders operations and reuses memory differently.

Left out: memory that a runtime takes for itself, fragmentation, and buffers of collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, PyTree

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS, grouped
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, decode
from puzzle_jax.model.sharding import on_mesh, params_sharding
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, ParamSpec, is_spec, param_specs
from puzzle_jax.model.stacked import StackedMXFP4
from puzzle_jax.plan.compilers import compiler

Tree = TypeVar("Tree")
_Abstract = jax.ShapeDtypeStruct

WIDTH, FLOAT32 = 2, 4
"""Bytes of a number in the compute dtype, and in fp32 master weights."""


def read_model(path: Path) -> tuple[ModelConfig, bool]:
    """The model that a config.json, or the directory that holds it, describes, and whether its experts are packed."""
    source = path / "config.json" if path.is_dir() else path
    data = read_json(source)
    return parse_config(data, source), parse_form(data, source) == "mxfp4"


def check_packed(config: ModelConfig) -> None:
    """Raises ConfigError where experts of these sizes cannot be packed."""
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        if size % GROUP:
            raise ConfigError(f"{name} is {size}, but packed experts need a multiple of {GROUP}")


def virtual_devices(count: int) -> None:
    """Gives JAX `count` virtual CPU devices, unless it is initialised already."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it is initialised; making the mesh fails where devices are too few
        pass


# Compiling ------------------------------------------------------------------------------------------------------------


def bytes_beside(lowered: jax.stages.Lowered) -> int:
    """Bytes that a lowered program allocates on a device beside its arguments: temporaries, and results that do not
    reuse the memory of an argument."""
    found = lowered.compile(compiler_options=dict(compiler().options)).memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def program_bytes(
    program: Callable[..., PyTree], *given: PyTree, mesh: Mesh | None = None, donate: int | None = None, **options: Any
) -> int:
    """`bytes_beside` of a function.

    Args:
      program: a function, jitted or not; it is jitted anew, so that no program that was traced elsewhere is reused.
      given: its arguments; those that hold arrays without values are arguments of the program, others are constants.
      mesh: where the program runs.
      donate: index of the argument whose memory results may reuse.
      options: further options of `jax.jit`.
    """
    inner = getattr(program, "__wrapped__", program)
    arrays = [
        index
        for index, value in enumerate(given)
        if any(isinstance(leaf, _Abstract) for leaf in jax.tree.leaves(value))
    ]

    def own(*values: object) -> object:
        return inner(*(values[arrays.index(index)] if index in arrays else each for index, each in enumerate(given)))

    if donate is not None:
        options["donate_argnums"] = arrays.index(donate)
    with on_mesh(mesh), kernel_shapes():
        return bytes_beside(jax.jit(own, **options).lower(*(given[index] for index in arrays)))


# Arrays without values ------------------------------------------------------------------------------------------------


def in_place(tree: Tree, shardings: PyTree) -> Tree:
    """A tree as arrays without values, with these shardings."""
    return jax.tree.map(_put, tree, shardings)


def device_bytes(tree: PyTree) -> int:
    """Bytes that one device holds of all arrays in a tree, or of their shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def zero_params(config: ModelConfig, packed: bool) -> Params:
    """A model's parameters as zeros, to be traced."""

    def zeros(path: jax.tree_util.KeyPath, spec: ParamSpec) -> Array | MXFP4:
        if not packed or path[-1].key not in EXPERT_MATRICES:  # pyright: ignore[reportAttributeAccessIssue]
            return jnp.zeros(spec.shape, compiler().dtype)
        experts, inputs, outputs = spec.shape
        codes, scales = (jnp.zeros((experts, outputs, inputs // each), jnp.uint8) for each in (2, GROUP))
        return MXFP4(codes, scales)

    return jax.tree_util.tree_map_with_path(zeros, param_specs(config), is_leaf=is_spec)


def layer_params(config: ModelConfig, mesh: Mesh | None, params: Callable[..., Params], *given: PyTree) -> Params:
    """The parameters that a function makes, without values, layer by layer and sharded for computation; packed experts
    are `StackedMXFP4`, which accepts arrays without values."""

    def stacked(node: PyTree) -> PyTree:
        return StackedMXFP4(node.codes, node.scales) if isinstance(node, MXFP4) else node

    def make(*given: PyTree) -> Params:
        return jax.tree.map(stacked, params(*given), is_leaf=lambda node: isinstance(node, MXFP4))

    shapes = jax.eval_shape(make, *given)
    if mesh is None:
        return shapes

    return jax.tree.map(
        lambda sharding, part: jax.tree.map(partial(_put, sharding=sharding), part),
        params_sharding(config, mesh),
        shapes,
    )


def _put(leaf: Array | jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(leaf: Array | jax.ShapeDtypeStruct) -> int:
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


# Experts by their shapes ----------------------------------------------------------------------------------------------


@contextmanager
def kernel_shapes() -> Iterator[None]:
    """A context in which grouped matmuls are traced as stand-ins with the shapes and dtypes of a kernel's operands and
    results, forward and backward, which read one row of one expert and return meaningless values. It has no effect
    where the compiler in force takes the real kernels."""
    if not compiler().stand_ins:
        yield
        return
    others = dict(IMPLEMENTATIONS)
    stand_in = partial(grouped.expert_outputs, kernel=_block_matmul, block_rows=BLOCK_ROWS["looped"])
    IMPLEMENTATIONS.clear()
    IMPLEMENTATIONS.update({"kernel_shapes": stand_in, **others})
    try:
        yield
    finally:
        IMPLEMENTATIONS.clear()
        IMPLEMENTATIONS.update(others)


def _block_matmul(
    rows: Float[Array, "padded inputs"],
    weights: Float[Array, "experts first second"] | MXFP4,
    expert: Int[Array, "blocks"],
    used: Int[Array, ""],
    *,
    transposed: bool = False,
) -> Float[Array, "padded outputs"]:
    parts = (weights.codes, weights.scales) if isinstance(weights, MXFP4) else (weights,)
    return _stand_in(rows, parts, transposed)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stand_in(rows: Array, parts: tuple[Array, ...], transposed: bool) -> Array:
    first = [part[:1] for part in parts]
    matrix = (decode(MXFP4(first[0], first[1]), rows.dtype) if len(first) == 2 else first[0].astype(rows.dtype))[0]
    one = matrix[:, 0] if transposed else matrix[0]
    # Barriers, so that both are materialised and not fused with what is computed before or after.
    rows = jax.lax.optimization_barrier(rows)
    return jax.lax.optimization_barrier(rows[:, :1] * one)


def _save(rows: Array, parts: tuple[Array, ...], transposed: bool) -> tuple[Array, tuple[Array, ...]]:
    return _stand_in(rows, parts, transposed), parts


def _backward(transposed: bool, parts: tuple[Array, ...], d_out: Array) -> tuple[Array, None]:
    return _stand_in(d_out, parts, not transposed), None


_stand_in.defvjp(_save, _backward)
