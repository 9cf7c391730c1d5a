"""Tunes tile sizes for the device present: all candidates are timed in turns, and the fastest is kept.

Called by `kernels.py --tune`. A candidate that does not compile or does not agree with the others is skipped, so a
table never holds settings with wrong results. An entry is written only if the best candidate is faster by more than
`MARGIN` than what the kernel computes for itself, so that the table does not record noise.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels import tiles
from puzzle_jax.kernels.expert_mlp.mosaic_gpu import gate_up
from puzzle_jax.kernels.grouped_matmul import block_matmul, blocks_of, grouped_matmul
from puzzle_jax.kernels.mxfp4 import MXFP4

MARGIN = 0.05
ROUNDS = 7

Settings = dict[str, int]


@dataclass(frozen=True)
class Knob:
    """One set of tile sizes to tune, for one problem size.

    Attributes:
      operation: name of the operation in the table.
      up_to: largest problem size that the entry is for.
      candidates: settings to try.
      run: function of the arrays, traced anew for every candidate.
      arrays: arguments of `run`.
    """

    operation: str
    up_to: int
    candidates: Sequence[Settings]
    run: Callable[..., jax.Array]
    arrays: tuple[Any, ...]


def tune(path: Path | None, small: bool) -> None:
    """Times all candidates and writes the device's entries into the table at `path`, the package's by default."""
    device = jax.local_devices()[0]
    path = path or tiles.TABLE
    if device.platform == "cpu" and path == tiles.TABLE:
        raise SystemExit("the package's table is for GPUs and TPUs; name a file with --json to tune for this CPU")
    found: dict[str, list[Settings]] = {}
    for knob in KNOBS[device.platform](small):
        best = fastest(knob)
        entries = found.setdefault(knob.operation, [])
        if best:
            entries.append({"up_to": knob.up_to, **best})
    table = json.loads(path.read_text()) if path.exists() else {}
    table[device.device_kind] = {operation: entries for operation, entries in found.items() if entries}
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    print(f"written to {path}")


def fastest(knob: Knob) -> Settings:
    """Returns the best candidate; empty if none is better than what the kernel computes for itself."""
    print(f"{knob.operation}, up to {knob.up_to}", flush=True)
    runs, expected = {}, None
    for number, settings in enumerate([{}, *knob.candidates]):
        try:
            run = traced(knob, settings)
            out = np.asarray(jax.jit(lambda x: x.astype(jnp.float32))(run(*knob.arrays)))
        except Exception as reason:  # no failure of a compiler or device may stop the others
            print(f"  {settings}: {' '.join(str(reason).split())[:100] or type(reason).__name__}", flush=True)
            continue
        if expected is None:
            expected = out
        if np.abs(out - expected).max() > 0.02 * np.abs(expected).max():
            print(f"  {settings}: does not agree with the others", flush=True)
            continue
        runs[number] = (settings, run)
    seconds: dict[int, list[float]] = {number: [] for number in runs}
    for _ in range(ROUNDS):
        for number, (_, run) in runs.items():
            start = time.perf_counter()
            jax.block_until_ready([run(*knob.arrays) for _ in range(3)])
            seconds[number].append((time.perf_counter() - start) / 3)
    medians = {number: statistics.median(taken) for number, taken in seconds.items()}
    for number, median in sorted(medians.items(), key=lambda pair: pair[1]):
        print(f"  {runs[number][0] or 'as reckoned'}: {median * 1e3:.3f} ms", flush=True)
    best = min(medians, key=medians.__getitem__, default=0)
    better = 0 not in medians or medians[best] < (1 - MARGIN) * medians[0]
    return runs[best][0] if medians and better else {}


def traced(knob: Knob, settings: Settings) -> Callable[..., jax.Array]:
    """The compiled program with these settings in force."""
    with tiles.using({knob.operation: settings} if settings else {}):
        return jax.jit(lambda *arrays: knob.run(*arrays)).lower(*knob.arrays).compile()


# What there is to tune ------------------------------------------------------------------------------------------------


def _grid(**values: Sequence[int]) -> list[Settings]:
    return [dict(zip(values, picked, strict=True)) for picked in itertools.product(*values.values())]


def _experts(small: bool) -> tuple[int, int, int]:
    """Numbers of experts, inputs and outputs: gpt-oss-120b's, or small ones."""
    return (4, 128, 192) if small else (128, 2880, 2880)


def _weights(form: str, shape: tuple[int, int, int]) -> jax.Array | MXFP4:
    experts, inputs, outputs = shape
    if form == "packed":
        codes = jax.random.bits(jax.random.key(0), (experts, outputs, inputs // 2), jnp.uint8)
        return MXFP4(codes, jnp.full((experts, outputs, inputs // 32), 120, jnp.uint8))
    return jax.random.normal(jax.random.key(0), (experts, inputs, outputs), jnp.bfloat16)


def _blocks(name: str, form: str, candidates: Mapping[int, Sequence[int]], small: bool) -> list[Knob]:
    """Knobs for the rows of a block, by the mean rows of an expert."""
    experts, inputs, _ = _experts(small)
    weights, knobs = _weights(form, _experts(small)), []
    for mean, sizes in candidates.items():
        rows = jax.random.normal(jax.random.key(1), (mean * experts, inputs), jnp.bfloat16)
        spread = np.random.default_rng(0).multinomial(len(rows), np.full(experts, 1 / experts))
        operation = f"grouped_matmul.{name}" if name == "blocked" else f"grouped_matmul.{name}.{form}_block"

        def run(rows: Any, weights: Any, sizes: Any) -> jax.Array:
            return grouped_matmul(rows, weights, sizes, implementation=name)

        knobs.append(Knob(operation, mean, _grid(block=sizes), run, (rows, weights, jnp.asarray(spread, jnp.int32))))
    return knobs


def _inside(name: str, form: str, blocks: Sequence[int], candidates: list[Settings], small: bool) -> list[Knob]:
    """Knobs for the tiles within a block, by the rows of a block."""
    experts, inputs, _ = _experts(small)
    weights, knobs = _weights(form, _experts(small)), []
    for block in blocks:
        sizes = jnp.full(experts, block if form == "packed" else 4 * block, jnp.int32)
        of = blocks_of(sizes, int(sizes.sum()), block)
        rows = jax.random.normal(jax.random.key(1), (len(of.source), inputs), jnp.bfloat16)

        def run(rows: Any, weights: Any, expert: Any, used: Any) -> jax.Array:
            out = block_matmul(rows, weights, expert, used, implementation=name)
            return jnp.where(jnp.arange(len(rows))[:, None] < used * (len(rows) // len(expert)), out, 0)

        operation = f"grouped_matmul.{name}.{form}"
        knobs.append(Knob(operation, block, candidates, run, (rows, weights, of.expert, of.used)))
    return knobs


def _fused(form: str, blocks: Sequence[int], candidates: list[Settings], small: bool) -> list[Knob]:
    """Knobs for the tiles of the fused gate-up kernel, whose weights have twice the outputs, by the rows of a block."""
    experts, inputs, inter = _experts(small)
    weights, knobs = _weights(form, (experts, inputs, 2 * inter)), []
    bias = jax.random.normal(jax.random.key(2), (experts, 2 * inter), jnp.bfloat16)
    for block in blocks:
        sizes = jnp.full(experts, block if form == "packed" else 4 * block, jnp.int32)
        of = blocks_of(sizes, int(sizes.sum()), block)
        rows = jax.random.normal(jax.random.key(1), (len(of.source), inputs), jnp.bfloat16)

        def run(rows: Any, weights: Any, bias: Any, expert: Any, used: Any) -> jax.Array:
            out = gate_up(rows, weights, bias, expert, used, limit=7.0)
            return jnp.where(jnp.arange(len(rows))[:, None] < used * (len(rows) // len(expert)), out, 0)

        arrays = (rows, weights, bias, of.expert, of.used)
        knobs.append(Knob(f"expert_mlp.mosaic_gpu_fused.{form}", block, candidates, run, arrays))
    return knobs


def on_gpu(small: bool) -> list[Knob]:
    name = "mosaic_gpu"
    return [
        *_fused("packed", (8, 16, 32, 64), _grid(groups=(2, 5, 6, 9, 10), steps=(2, 4)), small),
        *_fused("dense", (64, 128), _grid(tile_out=(64, 128, 192), steps=(3, 4, 6)), small),
        *_inside(name, "dense", (64, 128), _grid(tile_out=(64, 96, 128, 192), steps=(3, 4, 6)), small),
        *_inside(name, "packed", (8, 16, 32, 64), _grid(groups=(2, 5, 6, 9, 10), steps=(2, 4)), small),
        *_blocks(name, "dense", {64: (64, 128), 512: (64, 128, 192), 2560: (64, 128, 192)}, small),
        *_blocks(name, "packed", {2: (8, 16), 8: (8, 16, 32), 32: (16, 32, 64), 128: (32, 64, 128)}, small),
    ]


def on_tpu(small: bool) -> list[Knob]:
    name = "mosaic_tpu"
    return [
        *_inside(name, "dense", (64, 256, 512), _grid(tile_in=(512, 1024), tile_out=(256, 512, 1024)), small),
        *_inside(name, "packed", (16, 64), _grid(tile_in=(512, 1024), tile_out=(256, 512, 1024)), small),
        *_blocks(name, "dense", {64: (32, 64, 128), 512: (128, 256, 512), 2560: (256, 512)}, small),
        *_blocks(name, "packed", {2: (16,), 8: (16, 32), 32: (16, 32, 64), 128: (64, 128)}, small),
    ]


def on_cpu(small: bool) -> list[Knob]:
    """The plain implementation, to check that tuning works."""
    return _blocks("blocked", "dense", {4: (4, 8), 64: (16, 32, 64)}, True)


KNOBS = {"gpu": on_gpu, "tpu": on_tpu, "cpu": on_cpu}
