"""Sequence parallelism: `window_attention` on a mesh, each device holding some positions of a row.

A query needs the keys of positions that other devices hold, but no other head. So devices exchange positions for heads
(Ulysses, arXiv 2309.14509), attend, and exchange back:

    8 positions and 4 heads on 2 devices of the axis "sequence":

    held           device 0: positions 0-3, heads 0-3      device 1: positions 4-7, heads 0-3
    all-to-all     device 0: positions 0-7, heads 0-1      device 1: positions 0-7, heads 2-3
    all-to-all     as held

Between the two a device runs an ordinary implementation, which knows nothing about the mesh. It sends and receives
(2 heads + 2 key-value heads) x positions x dim / devices numbers, whatever the window. If an axis "model" shards heads
too, each of its devices exchanges its own share.

Key-value heads that the devices do not divide are repeated until they do, no more often than they have query heads:
with as many copies as one device's query heads need, a device gets the keys that it needs, at times one of them twice.

Left out: more devices than query heads, and windows so narrow that exchanging neighbours' keys would take fewer bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from puzzle_jax.kernels.shapes import Array, Keys, Queries, Segments, Sinks, Window

DATA, SEQUENCE, MODEL = "data", "sequence", "model"

Attention = Callable[..., Array]
"""Maps (q, k, v, sinks, window=, segment_ids=) to the output, for all positions of some rows and heads."""


def cuts(q: Queries, mesh: Mesh | AbstractMesh | None) -> bool:
    """Returns whether `mesh` shards positions, and its axes divide the positions and the heads of `q`."""
    if mesh is None or mesh.shape.get(SEQUENCE, 1) == 1:
        return False
    (_, seq, heads, _), devices = q.shape, mesh.shape[SEQUENCE]
    return seq % devices == 0 and heads % (devices * mesh.shape.get(MODEL, 1)) == 0


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    sinks: Sinks,
    attend: Attention,
    *,
    window: Window,
    segment_ids: Segments,
    mesh: Mesh | AbstractMesh,
) -> Queries:
    """The same result as `attend` on one device, for arrays that `mesh` `cuts`.

    Rows are sharded over the axis "data" if it divides them, and replicated over it if not.
    """
    batch, kv_heads = len(q), k.shape[2]
    model = MODEL if MODEL in mesh.shape else None
    rows = DATA if DATA in mesh.shape and batch % mesh.shape[DATA] == 0 else None
    copies = kv_copies(q.shape[2], kv_heads, mesh.shape[SEQUENCE] * mesh.shape.get(MODEL, 1))
    k, v = (jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k, v))

    # Heads are cut by the model axis first, so an exchange along the sequence axis splits each device's heads in order.
    cut = PartitionSpec(rows, SEQUENCE, model)
    given: dict[str, Array] = {}
    specs: dict[str, PartitionSpec] = {}
    if segment_ids is not None:
        given["segment_ids"], specs["segment_ids"] = segment_ids, PartitionSpec(rows)
    if window is not None and not isinstance(window, int):
        given["window"] = window.reshape(-1)
        specs["window"] = PartitionSpec(rows if given["window"].size == batch else None)

    def body(q: Array, k: Array, v: Array, sinks: Array, given: dict[str, Array]) -> Array:
        with jax.named_scope("positions_for_heads"):
            q, k, v = (lax.all_to_all(x, SEQUENCE, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        out = attend(q, k, v, sinks, **{"window": window, "segment_ids": None, **given})
        with jax.named_scope("heads_for_positions"):
            return lax.all_to_all(out, SEQUENCE, split_axis=1, concat_axis=2, tiled=True)

    heads = PartitionSpec((model, SEQUENCE) if model else SEQUENCE)
    run = jax.shard_map(body, mesh=mesh, in_specs=(cut, cut, cut, heads, specs), out_specs=cut, check_vma=False)
    return run(q, k, v, sinks, given)


def kv_copies(heads: int, kv_heads: int, devices: int) -> int:
    """Copies of each key-value head with which `devices` that divide `heads` get equally many each, and all they need.

    The smallest number that divides the query heads of a key-value head, so that copies share them evenly.
    """
    group = heads // kv_heads
    return next(c for c in range(1, group + 1) if group % c == 0 and kv_heads * c % devices == 0)
