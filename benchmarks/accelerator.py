"""The Pallas kernels on the GPU or TPU present: right first, then how far from their floors.

    python benchmarks/accelerator.py [--only grouped packed window decode] [--rounds 15] [--small] [--json PATH]

At the shapes of gpt-oss-120b. Each implementation is compared with a plain reference on a part of the result, then
timed in turns with the others; medians. The floor is the bytes that must cross memory at the device's bandwidth, or the
operations at its bf16 rate, whichever takes longer. What does not run is shown as missing, with the reason. `--small`
makes everything small, to try the script itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.kernels.decode_attention import decode_attention
from puzzle_jax.kernels.float8 import encode_e4m3
from puzzle_jax.kernels.grouped_matmul import grouped_matmul
from puzzle_jax.kernels.mxfp4 import MXFP4, decode
from puzzle_jax.kernels.window_attention import window_attention

PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "v5 lite": (197e12, 0.82e12), "v5": (459e12, 2.77e12)}
"""Dense bf16 operations and bytes per second by a part of the device's name, from data sheets."""


@dataclass(frozen=True)
class Case:
    """One operation on one set of arrays.

    Attributes:
      name: what is shown.
      arrays: arguments of the functions.
      functions: implementations by name.
      expected: of some arrays, a part of the right result.
      part: takes that part from a result.
      flops, num_bytes: that cannot be avoided.
    """

    name: str
    arrays: tuple[Any, ...]
    functions: dict[str, Callable[..., Any]]
    expected: Callable[..., Any]
    part: Callable[[Any], Any]
    flops: float
    num_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = jax.local_devices()[0]
    peaks = next((peak for part, peak in PEAKS.items() if part in device.device_kind), None)
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    rows = []
    for group in options.only:
        for case in CASES[group](options.small):
            rows += show(case, peaks, options.rounds)
            if options.json:
                found = {"device": device.device_kind, "jax": jax.__version__, "rows": rows}
                options.json.write_text(json.dumps(found, indent=1) + "\n")


def show(case: Case, peaks: tuple[float, float] | None, rounds: int) -> list[dict[str, Any]]:
    """Errors, milliseconds and shares of the floor of every implementation."""
    print(case.name, flush=True)
    expected = np.asarray(jax.jit(case.expected)(*case.arrays), np.float32)
    runs, errors, missing = {}, {}, {}
    for name, function in case.functions.items():
        try:
            run = jax.jit(function)
            found = np.asarray(case.part(run(*case.arrays)), np.float32)
        except Exception as reason:  # whatever a compiler or a device says, the others go on
            missing[name] = " ".join(str(reason).split())[:160] or type(reason).__name__
            continue
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        runs[name] = run
    seconds = timed(runs, case.arrays, rounds)
    floor = None if peaks is None else max(case.flops / peaks[0], case.num_bytes / peaks[1])
    rows = []
    for name in case.functions:
        if name in missing:
            print(f"  {name:<12} missing: {missing[name]}", flush=True)
            rows.append({"case": case.name, "implementation": name, "missing": missing[name]})
            continue
        took = statistics.median(seconds[name])
        share = "" if floor is None else f"   {floor / took:6.1%} of the floor"
        print(
            f"  {name:<12} {took * 1e3:9.3f} ms   {case.flops / took / 1e12:7.1f} TFLOP/s   "
            f"{case.num_bytes / took / 1e9:7.0f} GB/s{share}   error {errors[name]:.1e}",
            flush=True,
        )
        row = {"case": case.name, "implementation": name, "seconds": seconds[name], "error": errors[name]}
        rows.append({**row, "flops": case.flops, "bytes": case.num_bytes, "floor": floor})
    return rows


def timed(runs: dict[str, Any], arrays: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call, of several in a row, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls = {}
    for name, run in runs.items():
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        calls[name] = int(np.clip(0.02 / (time.perf_counter() - start), 1, 50))
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            outs = [run(*arrays) for _ in range(calls[name])]
            jax.block_until_ready(outs)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds


# Cases ---------------------------------------------------------------------------------------------------------------


def _normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * scale).astype(dtype)


def _implementations(operation: Callable[..., Any], names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    return {name: lambda *given, name=name: operation(*given, implementation=name, **options) for name in names}


def grouped(small: bool) -> list[Case]:
    """A layer's down projection in training, 327,680 rows: forwards, and the gradient of the rows."""
    experts, rows, inputs, outputs = (3, 192, 128, 192) if small else (128, 327_680, 2880, 2880)
    sizes = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts)).astype(np.int32)
    x, w = _normal(0, (rows, inputs)), _normal(1, (experts, inputs, outputs), scale=inputs**-0.5)
    some = min(int(sizes[0]), 256)
    names = ("mosaic_gpu", "mosaic_tpu", "ragged_dot", *(["blocked"] if small else []))
    flops = 2.0 * rows * inputs * outputs
    num_bytes = 2.0 * (rows * (inputs + outputs) + experts * inputs * outputs)
    shape = f"{rows} rows, {experts} experts, {inputs} x {outputs}, bf16"
    return [
        Case(
            f"grouped matmul, {shape}",
            (x, w, jnp.asarray(sizes)),
            _implementations(grouped_matmul, names) | _tokamax(),
            lambda x, w, sizes: x[:some].astype(jnp.float32) @ w[0].astype(jnp.float32),
            lambda out: out[:some],
            flops,
            num_bytes,
        ),
        Case(
            f"grouped matmul, transposed (gradient of the rows), {shape}",
            (_normal(2, (rows, outputs)), w, jnp.asarray(sizes)),
            _implementations(grouped_matmul, names, transposed=True),
            lambda x, w, sizes: x[:some].astype(jnp.float32) @ w[0].astype(jnp.float32).T,
            lambda out: out[:some],
            flops,
            num_bytes,
        ),
    ]


def _tokamax() -> dict[str, Any]:
    def run(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        import tokamax  # pyright: ignore[reportMissingImports]

        return tokamax.ragged_dot(x, w, sizes)

    return {"tokamax": run}


def packed(small: bool) -> list[Case]:
    """Both matrices of a layer's experts in MXFP4, 64 tokens at top 4, as in decoding."""
    experts, k, tokens = (5, 2, 6) if small else (128, 4, 64)
    shapes = [(128, 192), (192, 128)] if small else [(2880, 5760), (2880, 2880)]
    source = np.random.default_rng(0)
    chosen = np.stack([source.permutation(experts)[:k] for _ in range(tokens)])
    sizes = np.bincount(chosen.reshape(-1), minlength=experts).astype(np.int32)
    first = int(np.flatnonzero(sizes)[0])
    cases = []
    for inputs, outputs in shapes:
        blocks = source.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = source.integers(118, 124, (experts, outputs, inputs // 32)).astype(np.uint8)
        bytes_per_expert = inputs * outputs * 17 / 32
        cases.append(
            Case(
                f"grouped matmul, MXFP4, {tokens} tokens x top {k} of {experts}, {inputs} x {outputs}",
                (_normal(3, (tokens * k, inputs)), jnp.asarray(blocks), jnp.asarray(scales), jnp.asarray(sizes)),
                {
                    name: lambda x, b, s, n, name=name: grouped_matmul(x, MXFP4(b, s), n, implementation=name)
                    for name in ("mosaic_gpu", "mosaic_tpu", "ragged_dot", "blocked")
                },
                lambda x, b, s, n, first=first, some=int(sizes[first]): (
                    x[:some].astype(jnp.float32) @ decode(MXFP4(b[first : first + 1], s[first : first + 1]))[0]
                ),
                lambda out, some=int(sizes[first]): out[:some],
                2.0 * tokens * k * inputs * outputs,
                float(np.count_nonzero(sizes)) * bytes_per_expert + 2.0 * tokens * k * (inputs + outputs),
            )
        )
    return cases


def window(small: bool) -> list[Case]:
    """Attention over 65,536 tokens, full and within 128 keys, forwards and with gradients."""
    seq, heads, kv_heads, dim = (512, 4, 2, 64) if small else (65_536, 64, 8, 64)
    shapes = ((4, heads), (5, kv_heads), (6, kv_heads))
    arrays = (*(_normal(seed, (1, seq, of, dim)) for seed, of in shapes), _normal(7, (heads,), jnp.float32))
    return [case for width in (128, None) for case in _attention(arrays, width, min(seq, 512), small)]


def _attention(arrays: tuple[jax.Array, ...], width: int | None, some: int, small: bool) -> list[Case]:
    """Forwards, and with gradients; the first `some` tokens depend on no later ones."""
    (_, seq, heads, dim), kv_heads = arrays[0].shape, arrays[1].shape[2]

    def forward(*given: Any, name: str) -> jax.Array:
        return window_attention(*given, window=width, implementation=name)

    def gradients(*given: Any, name: str) -> jax.Array:
        def total(*given: Any) -> jax.Array:
            return jnp.sum(forward(*given, name=name).astype(jnp.float32) ** 2)

        of_q, of_k, of_v = jax.grad(total, (0, 1, 2))(*given)
        # Sums of the others, so that they are computed.
        sums = [jnp.sum(x.astype(jnp.float32))[None] for x in (of_k, of_v)]
        return jnp.concatenate([of_q[:, :some].astype(jnp.float32).reshape(-1), *sums])

    def head(*given: Any) -> tuple[Any, ...]:
        return (*(x[:, :some].astype(jnp.float32) for x in given[:3]), given[3])

    names = ("mosaic_gpu", "splash", "banded" if width else "causal_blocks")
    names = names if width or small else names[:2]  # XLA's blocks of logits would not fit
    keys = seq * min(width, seq) if width else seq * (seq + 1) / 2
    flops, num_bytes = 4.0 * heads * dim * keys, 2.0 * seq * dim * 2 * (heads + kv_heads)
    shape = f"{seq} tokens, {heads} heads of {dim} on {kv_heads}, window {width}"
    return [
        Case(
            f"attention, {shape}",
            arrays,
            {name: partial(forward, name=name) for name in names},
            lambda *given: forward(*head(*given), name="reference"),
            lambda out: out[:, :some],
            flops,
            num_bytes,
        ),
        Case(
            f"attention with gradients, {shape}",
            arrays,
            {name: partial(gradients, name=name) for name in names},
            lambda *given: gradients(*head(*given), name="reference")[:-2],
            lambda out: out[:-2],
            3.5 * flops,
            2.5 * num_bytes,
        ),
    ]


def cached(small: bool) -> list[Case]:
    """A token for each of 16 rows against 65,536 cached ones, and against a ring of 128."""
    return [
        _cached(slots, form, small) for slots in ((256, 128) if small else (65_536, 128)) for form in ("bf16", "e4m3")
    ]


def _cached(slots: int, form: str, small: bool) -> Case:
    batch, heads, kv_heads, dim = (2, 4, 2, 64) if small else (16, 64, 8, 64)
    k, v = _normal(8, (batch, kv_heads, dim, slots)), _normal(9, (batch, kv_heads, slots, dim))
    scale, scales = jnp.float32(0.02), {}
    if form == "e4m3":
        k, v = (jax.jit(encode_e4m3)(x, scale) for x in (k, v))
        scales = {"k_scale": scale, "v_scale": scale}
    positions = jnp.full((batch,), slots - 1 if slots > 128 else 1000, jnp.int32)

    def attend(*given: Any, name: str) -> jax.Array:
        return decode_attention(*given, window=None, implementation=name, **scales)

    def expected(q: Any, k: Any, v: Any, *given: Any) -> jax.Array:
        k, v = (x if form == "e4m3" else x.astype(jnp.float32) for x in (k, v))
        return attend(q.astype(jnp.float32), k, v, *given, name="reference")

    return Case(
        f"decode attention, {batch} rows, {slots} slots, {heads} heads of {dim} on {kv_heads}, {form}",
        (_normal(10, (batch, heads, dim)), k, v, _normal(11, (heads,), jnp.float32), positions),
        {name: partial(attend, name=name) for name in ("mosaic_gpu", "reference")},
        expected,
        lambda out: out,
        4.0 * batch * heads * dim * slots,
        2.0 * batch * kv_heads * dim * slots * (1 if form == "e4m3" else 2),
    )


CASES = {"grouped": grouped, "packed": packed, "window": window, "decode": cached}

if __name__ == "__main__":
    main()
