"""`route` on Hopper GPUs, in Pallas' Mosaic GPU: a program of one warpgroup per 64 tokens; see `tally`.

Logits stay in shared memory and pass through registers 64 experts at a time, once for each choice; experts chosen
before are masked by their index. A choice is the largest logit, with the lowest index among equals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from puzzle_jax.kernels.mosaic import hopper_only, launched, plgpu, product, stored, swizzled
from puzzle_jax.kernels.route.tally import Tally
from puzzle_jax.kernels.shapes import Array, Float, Ids, Index, Ref

TILE, CHUNK = 64, 64
"""Tokens per program, and experts in registers at a time; with 128 experts, registers spill."""

MOST_CHOICES, MOST_EXPERTS = 8, 256

Carry = TypeVar("Carry")


def routed(
    logits: Float[Array, "tokens experts"] | None,
    ids: Ids | None,
    k: int,
    experts: int,
    *,
    tally: bool,
    interpret: bool = False,
) -> Tally:
    """See `tally`. Raises NotImplementedError off Hopper GPUs (unless interpreted), below JAX 0.11.2, and
    for more than 8 choices or 256 experts."""
    hopper_only(interpret)
    if k > MOST_CHOICES or experts > MOST_EXPERTS:
        raise NotImplementedError(f"{k} of {experts} experts are more than {MOST_CHOICES} of {MOST_EXPERTS}")
    columns, choose = -(-experts // CHUNK) * CHUNK, ids is None
    tokens = len(ids) if ids is not None else len(logits) if logits is not None else 0
    tiles = -(-tokens // TILE)
    fill = tiles * TILE - tokens
    given: dict[str, Array] = {}
    if logits is not None:
        low = float(jnp.finfo(jnp.float32).min)
        wide = jnp.pad(jnp.maximum(logits.astype(jnp.float32), low), ((0, fill), (0, 0)))
        wide = jnp.pad(wide, ((0, 0), (0, columns - experts)), constant_values=-jnp.inf)
        given["logits"] = wide
    if ids is not None:
        known = jnp.where(ids < experts, ids, columns).astype(jnp.float32)
        padded = jnp.pad(known, ((0, fill), (0, 0)), constant_values=columns)
        given["ids"] = padded.reshape(tiles, TILE, k).transpose(0, 2, 1)
    if tally:
        given["triangle"] = jnp.tril(jnp.ones((TILE, TILE), jnp.bfloat16))
    by_choice = jax.ShapeDtypeStruct((tiles, k, TILE), jnp.float32)
    outputs = {}
    if choose:
        outputs["ids"] = by_choice
    if logits is not None:
        outputs["gates"] = by_choice
    if tally:
        outputs["rank"] = by_choice
        outputs["counts"] = jax.ShapeDtypeStruct((tiles, 8, columns), jnp.float32)
    mosaic = plgpu()
    matrix, by_row = mosaic.Layout.WGMMA, mosaic.Layout.WGMMA.reduce(1)

    def wide_of(values: Array) -> Array:
        return lax.broadcast_in_dim(values, (TILE, CHUNK), (0,))

    def filled(value: float | int) -> Array:
        return jnp.full((TILE,), float(value), jnp.float32)

    def numbers(first: Index) -> Array:
        own = mosaic.broadcasted_iota(jnp.int32, (TILE, CHUNK), 1, layout=matrix) + first
        return own.astype(jnp.float32)

    def kernel(*refs: Ref) -> None:
        named = dict(zip(given, refs, strict=False))
        out = dict(zip(outputs, refs[len(given) :], strict=False))
        scratch = iter(refs[len(given) + len(outputs) :])
        tile, by_choice_tile, triangle, arrived = (next(scratch) for _ in range(4))
        ones = list(scratch)
        t = lax.axis_index("tile")

        def over_chunks(step: Callable[[Index, Carry], Carry], carry: Carry) -> Carry:
            """Runs `step` with the first expert of each chunk; in a loop, since unrolled code would spill registers."""
            return lax.fori_loop(0, columns // CHUNK, lambda c, carry: step(c * CHUNK, carry), carry)

        def fetched(source: Ref, target: Ref) -> None:
            mosaic.copy_gmem_to_smem(source, target, arrived)
            mosaic.barrier_wait(arrived)

        def part(first: Index) -> Array:
            return mosaic.layout_cast(tile[:, pl.ds(first, CHUNK)], matrix)

        def in_rows(values: Array) -> Array:
            return mosaic.layout_cast(values, by_row)

        def given_out(name: str, values: list[Array]) -> None:
            for j, value in enumerate(values):
                by_choice_tile[j] = value
            stored((by_choice_tile, out[name].at[t]))

        if logits is not None:
            fetched(named["logits"].at[pl.ds(t * TILE, TILE)], tile)
        values: list[Array] = []
        if choose:
            chosen: list[Array] = []
            for _ in range(k):

                def better(first: Index, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                    best, index = carry
                    rest, number = part(first), numbers(first)
                    for other in chosen:
                        rest = jnp.where(number == wide_of(other), -jnp.inf, rest)
                    here = jnp.max(rest, axis=1)
                    # The lowest index is `columns` minus the largest `columns - index`.
                    left = jnp.max(jnp.where(rest == wide_of(here), columns - number, 0.0), axis=1)
                    return jnp.maximum(best, here), jnp.where(here > best, columns - left, index)

                best, index = over_chunks(better, (in_rows(filled(-jnp.inf)), in_rows(filled(columns))))
                chosen.append(index)
                values.append(best)
            given_out("ids", chosen)
        else:
            fetched(named["ids"].at[t], by_choice_tile)
            chosen = [in_rows(by_choice_tile[j]) for j in range(k)]
            if logits is not None:
                for index in chosen:

                    def found(first: Index, value: Array, index: Array = index) -> Array:
                        mine = jnp.where(numbers(first) == wide_of(index), part(first), -jnp.inf)
                        return jnp.maximum(value, jnp.max(mine, axis=1))

                    values.append(over_chunks(found, in_rows(filled(-jnp.inf))))
        if values:
            top = values[0]
            for value in values[1:]:
                top = jnp.maximum(top, value)
            weights = [jnp.exp(value - top) for value in values]
            total = weights[0]
            for weight in weights[1:]:
                total = total + weight
            given_out("gates", [weight / total for weight in weights])
        if tally:
            fetched(named["triangle"], triangle)
            ranks = [in_rows(filled(0)) for _ in chosen]
            for j, index in enumerate(chosen):
                for other in chosen[:j]:
                    ranks[j] = ranks[j] + jnp.where(other == index, 1.0, 0.0)

            def counted(first: Index, ranks: tuple[Array, ...]) -> tuple[Array, ...]:
                number = numbers(first)
                held = mosaic.layout_cast(jnp.zeros((TILE, CHUNK), jnp.float32), matrix)
                for index in chosen:
                    held = held + jnp.where(number == wide_of(index), 1.0, 0.0)
                ones[0][...] = held.astype(jnp.bfloat16)
                mosaic.commit_smem()
                before = product(triangle, ones[0], TILE, CHUNK)
                tile[:, pl.ds(first, CHUNK)] = before
                earlier = before - held
                mine = [jnp.where(number == wide_of(index), earlier, 0.0) for index in chosen]
                return tuple(rank + jnp.sum(own, axis=1) for rank, own in zip(ranks, mine, strict=True))

            given_out("rank", list(over_chunks(counted, tuple(ranks))))
            stored((tile.at[pl.ds(TILE - 8, 8)], out["counts"].at[t]))

    scratch: list[Any] = [mosaic.SMEM((TILE, columns), jnp.float32), mosaic.SMEM((k, TILE), jnp.float32)]
    scratch += [mosaic.SMEM((TILE, TILE), jnp.bfloat16, transforms=swizzled(TILE)), mosaic.Barrier()]
    if tally:
        scratch.append(mosaic.SMEM((TILE, CHUNK), jnp.bfloat16, transforms=swizzled(CHUNK)))
    call = launched(kernel, list(outputs.values()), {"tile": tiles}, scratch, interpret)
    results: dict[str, Array] = dict(zip(outputs, call(*given.values()), strict=True))
    found: dict[str, Array] = {}
    for name, result in results.items():
        if name == "counts":
            found[name] = result[:, -1, :experts].astype(jnp.int32)
            continue
        by_token = result.transpose(0, 2, 1).reshape(tiles * TILE, k)[:tokens]
        found[name] = by_token if name == "gates" else by_token.astype(jnp.int32)
    return Tally(**{"ids": ids, "tile": TILE, **found})
