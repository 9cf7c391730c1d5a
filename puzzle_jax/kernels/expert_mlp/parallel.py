"""Expert parallelism: `expert_mlp` on a mesh, each device holding some of the experts.

Tokens are sharded over the data axes and replicated over the model axis, which shards the experts. Either

    replicate    every device runs the pairs of its own experts for all of its data row's tokens; one sum over the
                 model axis
    all_to_all   every device takes its share of those tokens, sends each pair's row to the expert's device, and gets
                 the expert's output back

    of 8 tokens on 2 devices, experts a b | c d, top 1:

    replicate    device 0: tokens for a, b of 8      device 1: tokens for c, d of 8      sum of [8, hidden]
    all_to_all   device 0: tokens 0-3 -> a b | c d   device 1: tokens 4-7 -> a b | c d   rows there, outputs back

With replicate a device sends about 2 x tokens x hidden numbers, with all_to_all 2 x tokens x k / devices x hidden, plus
tokens x hidden to replicate the result. So all_to_all is for many devices and few experts per token, and for so many
tokens that bytes, not the number of collectives, take the time. Neither drops a pair: buffers are sized for the worst
case, but only the rows that exist are sent, and kernels compute only those.

Rows of tokens with as many dimensions as there are data axes, for example [rows, positions] on ("data", "sequence"),
stay where they are: each device lists the tokens that it holds, in its own order. One list of all rows' tokens would be
sharded differently, and would have to be moved.

Left out: overlap of exchange and experts; devices that share an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from puzzle_jax.kernels.expert_mlp.reference import Experts
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route import Routing
from puzzle_jax.kernels.shapes import Array, ExpertOutputs, Float, Ids, Int, Shaped, Tokens

MODEL = "model"
WAYS = ("replicate", "all_to_all")
MANY_PAIRS = 1024
"""From this many pairs per device on, bytes matter more than the number of collectives."""

Outputs = Callable[[Array, Array, Experts], Array]
"""Maps (x, ids, experts) to the outputs of each token's chosen experts, undefined for ids past the experts."""


def _data_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in mesh.axis_names if axis != MODEL)


def way_for(tokens: int, k: int, devices: int) -> str:
    """The way that should be faster for this many tokens of a data shard on this many devices of the model axis."""
    fewer_bytes = 2 * k / devices + 1 < 2
    return "all_to_all" if fewer_bytes and tokens * k >= MANY_PAIRS * devices else "replicate"


def mixture(
    x: Float[Array, "*positions hidden"],
    routing: Routing,
    experts: Experts,
    outputs: Outputs,
    combine: Callable[[Array, Array], Array],
    *,
    mesh: Mesh | AbstractMesh,
    way: str | None = None,
) -> Float[Array, "*positions hidden"]:
    """The same result as `expert_mlp` on one device, in the dtype of `x`.

    Args:
      outputs: computes the outputs of the experts that one device holds, whose ids start at 0 there.
      combine: maps outputs and gates to their weighted sum.
      mesh: its axis "model" shards the experts, all others the tokens.
      way: one of `WAYS`; by default that of `way_for`.

    Raises ValueError if the model axis does not divide the experts, and for an unknown way.
    """
    tokens, k = routing.ids.shape
    num_experts, devices = experts.down_bias.shape[0], mesh.shape[MODEL]
    if num_experts % devices:
        raise ValueError(f"{num_experts} experts cannot be cut for {devices} devices of the axis {MODEL!r}")
    data = _data_axes(mesh)
    way = way or way_for(-(-tokens // math.prod(mesh.shape[axis] for axis in data)), k, devices)
    if way not in WAYS:
        raise ValueError(f"way is {way!r}, but must be one of {', '.join(WAYS)}")
    own = num_experts // devices
    exchanged = way == "all_to_all"

    def body(x: Array, ids: Array, gates: Array, experts: Experts) -> Array:
        held = x.shape
        x, ids, gates = (array.reshape(-1, array.shape[-1]) for array in (x, ids, gates))
        if exchanged:
            out = combine(_exchange(x, ids, experts, outputs, own, devices), gates)
        else:
            found = _own_outputs(x, ids, experts, outputs, own)
            out = lax.psum(combine(found.astype(jnp.float32), gates), MODEL).astype(x.dtype)
        return out.reshape(held)

    # With all_to_all, a device takes its share of its model axis's tokens, along the last dimension of positions.
    cuts: list[tuple[str, ...]] = [(axis,) for axis in data[:-1]] + [(data[-1], MODEL) if exchanged else (data[-1],)]
    in_place = len(cuts) > 1 and _divide(x.shape[:-1], cuts, mesh)
    everywhere = sum(cuts, ())
    rows = PartitionSpec(*cuts) if in_place else PartitionSpec(everywhere)
    specs = (rows, rows, rows, PartitionSpec(MODEL))
    run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    if in_place:
        ids, gates = (array.reshape(*x.shape[:-1], k) for array in routing)
        return run(x, ids, gates, experts)
    # Rows that pad the tokens to a multiple of the devices choose an expert that does not exist.
    fill = -tokens % math.prod(mesh.shape[axis] for axis in everywhere)
    flat, ids, gates = (
        jnp.pad(array, ((0, fill), (0, 0)), constant_values=value)
        for array, value in ((x.reshape(-1, x.shape[-1]), 0), (routing.ids, num_experts), (routing.gates, 0))
    )
    return run(flat, ids, gates, experts)[:tokens].reshape(x.shape)


def separate(x: Tokens, ids: Ids, experts: Experts, outputs: Outputs, *, mesh: Mesh | AbstractMesh) -> ExpertOutputs:
    """The output of every chosen expert, on all devices of the model axis: as `replicate`, without the sum over k."""
    (tokens, _), num_experts = ids.shape, experts.down_bias.shape[0]
    own, data = num_experts // mesh.shape[MODEL], _data_axes(mesh)

    def body(x: Array, ids: Array, experts: Experts) -> Array:
        return lax.psum(_own_outputs(x, ids, experts, outputs, own), MODEL)

    fill = -tokens % math.prod(mesh.shape[axis] for axis in data)
    rows = PartitionSpec(data)
    run = jax.shard_map(body, mesh=mesh, in_specs=(rows, rows, PartitionSpec(MODEL)), out_specs=rows, check_vma=False)
    x, ids = (
        jnp.pad(array, ((0, fill), (0, 0)), constant_values=value) for array, value in ((x, 0), (ids, num_experts))
    )
    return run(x, ids, experts)[:tokens]


def _divide(sizes: tuple[int, ...], cuts: Sequence[tuple[str, ...]], mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether there are as many dimensions as groups of axes, and each group divides its dimension."""
    return len(sizes) == len(cuts) and all(
        size % math.prod(mesh.shape[axis] for axis in cut) == 0 for size, cut in zip(sizes, cuts, strict=True)
    )


def _own_outputs(x: Tokens, ids: Ids, experts: Experts, outputs: Outputs, own: int) -> ExpertOutputs:
    """Outputs of this device's experts, and 0 for pairs of other devices' experts."""
    ids = ids - lax.axis_index(MODEL) * own
    here = (ids >= 0) & (ids < own)
    found = outputs(x, jnp.where(here, ids, own), experts)
    # Outputs for other devices' pairs are undefined, so they are replaced: NaN times a gate of zero would stay NaN.
    return jnp.where(here[..., None], found, 0)


def _exchange(x: Tokens, ids: Ids, experts: Experts, outputs: Outputs, own: int, devices: int) -> ExpertOutputs:
    """Outputs of the experts of this device's tokens, whichever devices hold them."""
    tokens, k = ids.shape
    pairs, flat = tokens * k, ids.reshape(-1)
    owner = flat // own  # `devices` or more for padding pairs, which sort last and are not sent
    order = jnp.argsort(owner, stable=True)
    sizes = jnp.sum((owner[:, None] == jnp.arange(devices)).astype(jnp.int32), axis=0)
    table = lax.all_gather(sizes, MODEL)  # [from, to]
    me = lax.axis_index(MODEL)
    # Where the rows from one sender to one receiver start: among the sender's rows, and among the receiver's.
    at_sender, at_receiver = _before(table, 1), _before(table, 0)
    there = Parts(at_sender[me], sizes, at_receiver[me], table[:, me])
    back = Parts(at_receiver[:, me], table[:, me], at_sender[:, me], sizes)

    room = devices * pairs
    sent = x[order // k]
    rows = send(sent, jnp.zeros((room, x.shape[1]), x.dtype), there)
    wanted = send(flat[order] % own, jnp.full(room, own, flat.dtype), there)
    found = outputs(rows, wanted[:, None], experts)[:, 0]
    found = jnp.where((wanted < own)[:, None], found, 0)
    returned = send(found, jnp.zeros((pairs, x.shape[1]), found.dtype), back)
    return jnp.zeros_like(returned).at[order].set(returned).reshape(tokens, k, -1)


def _before(table: Int[Array, "senders receivers"], dimension: int) -> Int[Array, "senders receivers"]:
    return jnp.cumsum(table, axis=dimension) - table


class Parts(NamedTuple):
    """The rows that a device sends to each device, and receives from it.

    Attributes:
      starts: where the rows for each device start among its own.
      sizes: how many rows it sends to each.
      targets: where they start among the receiver's rows.
      coming: how many rows it receives from each.
    """

    starts: Int[Array, "devices"]
    sizes: Int[Array, "devices"]
    targets: Int[Array, "devices"]
    coming: Int[Array, "devices"]


def send(rows: Shaped[Array, "rows *columns"], into: Shaped[Array, "room *columns"], parts: Parts) -> Array:
    """Sends rows to other devices, and receives theirs into `into`, by `lax.ragged_all_to_all`, which CPUs lack.

    There all rows go to all devices, and each takes its own.
    """
    if target_platform() != "cpu":
        return lax.ragged_all_to_all(
            rows, into, parts.starts, parts.sizes, parts.targets, parts.coming, axis_name=MODEL
        )
    everyones, starts, sizes, targets = (lax.all_gather(part, MODEL) for part in (rows, *parts[:3]))
    me, place = lax.axis_index(MODEL), jnp.arange(len(into))
    for sender in range(len(sizes)):
        turn = place - targets[sender, me]
        taken = (turn >= 0) & (turn < sizes[sender, me])
        found = everyones[sender].at[turn + starts[sender, me]].get(mode="clip")
        into = jnp.where(taken.reshape(-1, *[1] * (rows.ndim - 1)), found, into)
    return into
