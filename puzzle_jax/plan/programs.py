"""What programs need on every device, found without weights and without accelerators.

A program is traced with arrays that have shapes, dtypes and places on a mesh, but no values, and compiled for virtual
devices. What it is given is exact. Temporaries are what XLA's compiler for CPUs allots, of a program that is kept like
an accelerator's in three ways:

    experts    grouped matmuls stand in it by their operands and results alone (`kernel_shapes`); the way for CPUs would
               lay one expert's matrices beside every block of rows
    bfloat16   is float16, which is as wide; CPUs would hold what they compute in bfloat16 in float32
    order      what rematerialisation fences off stays fenced off; XLA for CPUs would merge a layer's two passes again

An accelerator's compiler orders operations and reuses memory in its own way.

Left out: what a runtime takes for itself, fragmentation and collectives' buffers; what `ragged_dot` allots on GPUs for
which XLA has no grouped matmul.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from puzzle_jax.config import ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import parse_config, parse_form
from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.errors import ConfigError
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS, grouped
from puzzle_jax.kernels.grouped_matmul import BLOCK_ROWS
from puzzle_jax.kernels.mxfp4 import GROUP, MXFP4, decode
from puzzle_jax.model.spec import EXPERT_MATRICES, Params, ParamSpec, is_spec, param_specs

GB = 1e9

DTYPE = jnp.float16
"""In place of bfloat16, which accelerators compute in."""

WIDTH, FLOAT32 = 2, 4
"""Bytes of a number in what is computed in, and in masters."""

COMPILER = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
"""Options for a program that never runs: nothing of the machine code that a CPU would be given matters, and making it
takes longest."""


def bytes_beside(lowered: Any) -> int:
    """What a program of `jax.jit` allots on a device beside its arguments: temporaries, and results that do not take
    the place of an argument."""
    found = lowered.compile(compiler_options=COMPILER).memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


# Arrays without values ------------------------------------------------------------------------------------------------


def in_place(tree: Any, shardings: Any) -> Any:
    """Arrays without values, of a tree and where its leaves lie."""
    return jax.tree.map(_put, tree, shardings)


def device_bytes(tree: Any) -> int:
    """Of one device's part of all arrays in a tree, or of their shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def zero_params(config: ModelConfig, packed: bool) -> Params:
    """A model's parameters as zeros, to be traced."""

    def zeros(path: tuple[Any, ...], spec: ParamSpec) -> Array | MXFP4:
        if not packed or path[-1].key not in EXPERT_MATRICES:
            return jnp.zeros(spec.shape, DTYPE)
        experts, inputs, outputs = spec.shape
        codes, scales = (jnp.zeros((experts, outputs, inputs // each), jnp.uint8) for each in (2, GROUP))
        return MXFP4(codes, scales)

    return jax.tree_util.tree_map_with_path(zeros, param_specs(config), is_leaf=is_spec)


def _put(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _bytes(leaf: Any) -> int:
    """Of one device's part."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


# Experts by their shapes ----------------------------------------------------------------------------------------------


@contextmanager
def kernel_shapes() -> Iterator[None]:
    """Within, what is traced has grouped matmuls that read one row of one expert and give what nobody shall use, in the
    shapes and dtypes of a kernel's operands and results, forwards and backwards."""
    others = dict(IMPLEMENTATIONS)
    stand_in = partial(grouped.expert_outputs, kernel=_block_matmul, block_rows=BLOCK_ROWS["ragged_dot"])
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
    # Fences, so that both are arrays and no part of what is computed before or after.
    rows = jax.lax.optimization_barrier(rows)
    return jax.lax.optimization_barrier(rows[:, :1] * one)


def _save(rows: Array, parts: tuple[Array, ...], transposed: bool) -> tuple[Array, tuple[Array, ...]]:
    return _stand_in(rows, parts, transposed), parts


def _backward(transposed: bool, parts: tuple[Array, ...], d_out: Array) -> tuple[Array, None]:
    return _stand_in(d_out, parts, not transposed), None


_stand_in.defvjp(_save, _backward)


# What a command is told -----------------------------------------------------------------------------------------------


def check_packed(config: ModelConfig) -> None:
    """Raises ConfigError where experts of these sizes cannot be packed."""
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        if size % GROUP:
            raise ConfigError(f"{name} is {size}, but packed experts need a multiple of {GROUP}")


def device_limit(options: argparse.Namespace) -> float:
    """Bytes of a device. Raises ConfigError where there are none."""
    if not (isfinite(options.hbm_gb) and options.hbm_gb > 0):
        raise ConfigError(f"--hbm-gb is {options.hbm_gb}, but must be a finite number above 0")
    return options.hbm_gb * GB


def read_model(path: Path) -> tuple[ModelConfig, bool]:
    """A model by its config.json or the directory of it, and whether its experts are packed."""
    source = path / "config.json" if path.is_dir() else path
    data = read_json(source)
    return parse_config(data, source), parse_form(data, source) == "mxfp4"


def virtual_devices(count: int) -> None:
    """Makes JAX a CPU of so many devices, where it has not begun yet."""
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has begun; `make_training_mesh` says whether there are enough
        pass
