"""Kernels on the device present: checks that they are correct, then how far they are from their floors.

    python benchmarks/kernels.py [--only grouped packed experts window chunk decode] [--rounds 15] [--small]
        [--json PATH]
    python benchmarks/kernels.py --tune [--json PATH]

Shapes are those of gpt-oss-120b on a GPU or TPU, and those of a small model on a CPU. Each implementation is compared
with a plain reference on a part of the result, then timed in turns with the others; medians are shown, with ratios to
the first one. The floor is the time for the bytes that must cross memory at the device's bandwidth, or for the
operations at its peak rate, whichever is longer; a CPU's peaks are measured when the script starts. What does not run
is shown as missing, with the reason. `--small` makes everything small, to try the script itself.

`--tune` finds tile sizes for the device and writes them to the package's table (`kernels/tiles.json`) or to `--json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kernel_cases
import kernel_tuning
import numpy as np

PEAKS = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "v5 lite": (197e12, 0.82e12), "v5": (459e12, 2.77e12)}
"""Dense bf16 operations and bytes per second by a part of the device's name, from data sheets."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=kernel_cases.ON_ACCELERATORS, help="groups of operations")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--accelerator", action="store_true", help="the shapes for GPUs and TPUs, whatever this is")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = jax.local_devices()[0]
    print(f"{device.device_kind}, {device.platform}, jax {jax.__version__}", flush=True)
    if options.tune:
        kernel_tuning.tune(options.json, options.small)
        return
    on_cpu = device.platform == "cpu" and not options.accelerator
    groups = kernel_cases.ON_CPUS if on_cpu else kernel_cases.ON_ACCELERATORS
    peaks = cpu_peaks() if on_cpu else next((peak for part, peak in PEAKS.items() if part in device.device_kind), None)
    rows = []
    for group in options.only or groups:
        for case in groups[group](options.small) if group in groups else []:
            rows += show(case, peaks, options.rounds)
            if options.json:
                found = {"device": device.device_kind, "jax": jax.__version__, "rows": rows}
                options.json.write_text(json.dumps(found, indent=1) + "\n")


def cpu_peaks() -> tuple[float, float]:
    """Operations per second of a large float32 matmul, and bytes per second of a sum of large arrays."""
    size, words = 1536, 1 << 25
    a, b = jnp.ones((size, size)), jnp.ones(words)
    runs = {"matmul": jax.jit(jnp.matmul), "add": jax.jit(jnp.add)}
    arrays = {"matmul": (a, a), "add": (b, b)}
    took = {}
    for name, run in runs.items():
        jax.block_until_ready(run(*arrays[name]))
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(run(*arrays[name]))
            seconds.append(time.perf_counter() - start)
        took[name] = statistics.median(seconds)
    peaks = 2.0 * size**3 / took["matmul"], 12.0 * words / took["add"]
    print(f"measured: {peaks[0] / 1e9:.0f} GFLOP/s, {peaks[1] / 1e9:.1f} GB/s")
    return peaks


def show(case: kernel_cases.Case, peaks: tuple[float, float] | None, rounds: int) -> list[dict[str, Any]]:
    """Prints and returns the error, time and share of the floor of every implementation."""
    print(case.name, flush=True)
    expected = np.asarray(jax.jit(case.expected)(*case.arrays), np.float32)
    runs, errors, missing = {}, {}, {}
    for name, function in case.functions.items():
        try:
            run = jax.jit(function)
            found = np.asarray(case.part(run(*case.arrays)), np.float32)
        except Exception as reason:  # no failure of a compiler or device may stop the others
            missing[name] = " ".join(str(reason).split())[:160] or type(reason).__name__
            continue
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        runs[name] = run
    seconds = timed(runs, case.arrays, rounds)
    floor = None if peaks is None else max(case.flops / peaks[0], case.num_bytes / peaks[1])
    first = statistics.median(next(iter(seconds.values()))) if seconds else 0.0
    rows = []
    for name in case.functions:
        if name in missing:
            print(f"  {name:<14} missing: {missing[name]}", flush=True)
            rows.append({"case": case.name, "implementation": name, "missing": missing[name]})
            continue
        took = statistics.median(seconds[name])
        share = "" if floor is None else f"   {floor / took:6.1%} of the floor"
        print(
            f"  {name:<14} {took * 1e3:9.3f} ms   {first / took:6.2f}x   {case.flops / took / 1e12:8.3f} TFLOP/s   "
            f"{case.num_bytes / took / 1e9:7.1f} GB/s{share}   error {errors[name]:.1e}",
            flush=True,
        )
        row = {"case": case.name, "implementation": name, "seconds": seconds[name], "error": errors[name]}
        rows.append({**row, "flops": case.flops, "bytes": case.num_bytes, "floor": floor})
    return rows


def timed(runs: dict[str, Any], arrays: tuple[Any, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds per call by turn, from several calls in a row; each turn starts with a call that is not timed.

    That call absorbs the effects of the program before it: after one that needs gigabytes, a CPU's allocator has no
    pages left, and the next program would pay for them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    calls = {}
    for name, run in runs.items():
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        calls[name] = int(np.clip(0.02 / (time.perf_counter() - start), 1, 50))
    for _ in range(rounds):
        for name, run in runs.items():
            jax.block_until_ready(run(*arrays))
            start = time.perf_counter()
            outs = [run(*arrays) for _ in range(calls[name])]
            jax.block_until_ready(outs)
            seconds[name].append((time.perf_counter() - start) / calls[name])
    return seconds


if __name__ == "__main__":
    main()
