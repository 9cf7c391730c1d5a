"""Attention on a mesh that shards rows and heads: every device computes its own, and nothing is communicated.

XLA finds this partitioning by itself for its own operations, but not for kernels, which it would give all rows and
heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from puzzle_jax.kernels.shapes import Array, Sinks

DATA, MODEL = "data", "model"


def spreads(mesh: Mesh | AbstractMesh | None, heads: int, kv_heads: int) -> TypeGuard[Mesh | AbstractMesh]:
    """Returns whether `by_rows_and_heads` can split the work: the mesh has several devices, and its "model" axis, if
    any, divides the heads."""
    if mesh is None or mesh.size == 1:
        return False
    model = mesh.shape.get(MODEL, 1)
    return heads % model == 0 and kv_heads % model == 0


def by_rows_and_heads(
    attend: Callable[..., Array],
    mesh: Mesh | AbstractMesh,
    arrays: Sequence[Array],
    heads_axis: int,
    sinks: Sinks,
    **options: Array | int | None,
) -> Array:
    """The result of `attend(*arrays, sinks, **options)`, where each device computes its own rows and heads.

    Args:
      arrays: queries, keys and values, whose first axis is rows.
      heads_axis: the axis of heads in all arrays and in the result.
      options: keyword arguments of `attend`; arrays with one entry per row are sharded like the rows, if the axis
        "data" divides those, and others are replicated.
    """
    batch = len(arrays[0])
    rows = DATA if DATA in mesh.shape and batch % mesh.shape[DATA] == 0 else None
    cut = PartitionSpec(rows, *[None] * (heads_axis - 1), MODEL)
    given = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    others = {name: value for name, value in options.items() if name not in given}
    by_row = {name: value.ndim > 0 and len(value) == batch for name, value in given.items()}
    specs = {name: PartitionSpec(rows) if of_row else PartitionSpec() for name, of_row in by_row.items()}

    def body(arrays: Sequence[Array], sinks: Array, given: dict[str, Array]) -> Array:
        return attend(*arrays, sinks, **given, **others)

    in_specs = ([cut] * len(arrays), PartitionSpec(MODEL), specs)
    run = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=cut, check_vma=False)
    return run(list(arrays), sinks, given)
