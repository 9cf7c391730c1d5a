"""`route` on TPUs, in Pallas: a program per tile of tokens; see `tally`.

A token's choices are the lanes of one register, so ids, gates and ranks are written as whole registers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.kernels.route.tally import Tally
from puzzle_jax.kernels.shapes import Array, Float, Ids, Ref

LANES, SUBLANES = 128, 8
MOST_TOKENS, MOST_EXPERTS = 256, 1024


def routed(
    logits: Float[Array, "tokens experts"] | None,
    ids: Ids | None,
    k: int,
    experts: int,
    *,
    tally: bool,
    interpret: bool = False,
) -> Tally:
    """See `tally`. Raises NotImplementedError off TPUs unless interpreted, and for more than 128 choices or 1,024
    experts."""
    if not interpret and target_platform() != "tpu":
        raise NotImplementedError(f"for TPUs, but this is {target_platform()}")
    if k > LANES or experts > MOST_EXPERTS:
        raise NotImplementedError(f"{k} of {experts} experts are more than {LANES} of {MOST_EXPERTS}")
    tokens = len(ids) if ids is not None else len(logits) if logits is not None else 0
    tile = min(MOST_TOKENS, -(-tokens // SUBLANES) * SUBLANES)
    tiles, columns = -(-tokens // tile), -(-experts // LANES) * LANES
    fill, choose = tiles * tile - tokens, ids is None
    given, specs = [], []
    if logits is not None:
        low = float(jnp.finfo(jnp.float32).min)
        wide = jnp.pad(jnp.maximum(logits.astype(jnp.float32), low), ((0, fill), (0, 0)))
        given.append(jnp.pad(wide, ((0, 0), (0, columns - experts)), constant_values=-jnp.inf))
        specs.append(pl.BlockSpec((tile, columns), lambda t: (t, 0)))
    if ids is not None:
        padded = jnp.pad(ids.astype(jnp.int32), ((0, fill), (0, LANES - k)), constant_values=columns)
        padded = jnp.where(padded < experts, padded, columns)
        given.append(padded)
        specs.append(pl.BlockSpec((tile, LANES), lambda t: (t, 0)))
    by_choice = jax.ShapeDtypeStruct((tiles * tile, LANES), jnp.int32), pl.BlockSpec((tile, LANES), lambda t: (t, 0))
    outputs = {}
    if choose:
        outputs["ids"] = by_choice
    if logits is not None:
        outputs["gates"] = jax.ShapeDtypeStruct((tiles * tile, LANES), jnp.float32), by_choice[1]
    if tally:
        outputs["rank"] = by_choice
        of_tiles = jax.ShapeDtypeStruct((tiles * SUBLANES, columns), jnp.int32)
        outputs["counts"] = of_tiles, pl.BlockSpec((SUBLANES, columns), lambda t: (t, 0))

    def kernel(*refs: Ref) -> None:
        inputs = list(refs[: len(given)])
        out = dict(zip(outputs, refs[len(given) :], strict=True))
        number = lax.broadcasted_iota(jnp.int32, (tile, columns), 1)
        lane = lax.broadcasted_iota(jnp.int32, (tile, LANES), 1)
        x = inputs.pop(0)[...] if logits is not None else None
        if choose:
            assert x is not None
            chosen, values, rest = [], [], x
            for _ in range(k):
                best = jnp.max(rest, axis=1, keepdims=True)
                index = jnp.min(jnp.where(rest == best, number, columns), axis=1, keepdims=True)
                rest = jnp.where(number == index, -jnp.inf, rest)
                chosen.append(index)
                values.append(best)
            out["ids"][...] = _in_lanes(chosen, lane, 0)
        else:
            given_ids = inputs.pop(0)[...]
            of_lane = [jnp.where(lane == j, given_ids, 0) for j in range(k)]
            chosen = [jnp.sum(each, axis=1, keepdims=True) for each in of_lane]
            values = []
            if x is not None:
                mine = [jnp.where(number == index, x, -jnp.inf) for index in chosen]
                values = [jnp.max(each, axis=1, keepdims=True) for each in mine]
        if values:
            top = values[0]
            for value in values[1:]:
                top = jnp.maximum(top, value)
            weights = [jnp.exp(value - top) for value in values]
            out["gates"][...] = _in_lanes([weight / sum(weights) for weight in weights], lane, 0.0)
        if tally:
            total = sum((number == index).astype(jnp.float32) for index in chosen)
            rows, columns_of = (lax.broadcasted_iota(jnp.int32, (tile, tile), axis) for axis in (0, 1))
            triangle = (columns_of <= rows).astype(jnp.float32)
            before = jnp.dot(triangle, total, preferred_element_type=jnp.float32)
            ranks = []
            for j, index in enumerate(chosen):
                mine = number == index
                rank = jnp.sum(jnp.where(mine, before - total, 0.0), axis=1, keepdims=True)
                ranks.append(rank + sum((other == index).astype(jnp.float32) for other in chosen[:j]))
            out["rank"][...] = _in_lanes([rank.astype(jnp.int32) for rank in ranks], lane, 0)
            counts = jnp.sum(total, axis=0, keepdims=True).astype(jnp.int32)
            out["counts"][...] = jnp.broadcast_to(counts, (SUBLANES, columns))

    call = pl.pallas_call(
        kernel,
        grid=(tiles,),
        in_specs=specs,
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
    )
    found = dict(zip(outputs, call(*given), strict=True))
    for name in ("ids", "gates", "rank"):
        if name in found:
            found[name] = found[name][:tokens, :k]
    if tally:
        found["counts"] = found["counts"].reshape(tiles, SUBLANES, columns)[:, 0, :experts]
    return Tally(**{"ids": ids, "tile": tile, **found})


def _in_lanes(values: list[Array], lane: Array, empty: float | int) -> Array:
    """A register with value j of each row in lane j."""
    out = jnp.full(lane.shape, empty, values[0].dtype)
    for j, value in enumerate(values):
        out = jnp.where(lane == j, value, out)
    return out
