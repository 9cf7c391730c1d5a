"""The devices that scenarios name: memory, bandwidth, matrix rates, links.

Memory is what the driver or the runtime reports, which a vendor's round figure may miss by several percent: the "80 GB"
of an H100 are 85.5e9 bytes. Rates are dense, without sparsity. Link bandwidth is that of one device in one direction,
half of the figure that vendors publish. Latency and launch times are not data-sheet figures but measured in practice:
8 x H100 all-reduce a small tensor in 6 to 8 us (sglang, pull request 2904); kernels of a captured CUDA graph follow
each other about 2 us apart, operations of an XLA program on a TPU about half of that.

Cards without NVLink all-reduce over PCIe, through host memory where the driver allows no direct access; their latency
is a guess.

Sources: NVIDIA data sheets of A100 80GB SXM, H100 SXM5, H200 SXM, HGX B200 and L4, and NVIDIA's description of the Ada
architecture for the RTX 4090; Google Cloud TPU documentation (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e); the memory
of NVIDIA devices by nvidia-smi. JAX is imported only when the device present is examined.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

from puzzle_jax.errors import check_choice, check_range
from puzzle_jax.numeric import LARGEST, Number

_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
      name: name that scenarios use.
      memory_bytes: total memory of the device.
      bytes_per_second: memory bandwidth.
      flops_per_second: dense bfloat16 matrix rate, a multiply and an add counting as two.
      fp8_flops_per_second: the same on FP8 operands; the bfloat16 rate where there is no faster one.
      link_bytes_per_second: bandwidth to other devices of the same host, in one direction.
      link_latency_seconds: latency of one collective, however small.
      launch_seconds: time between two operations, however small.

    Raises `ConfigError` if a number is not above 0 (latency and launch may be 0).
    """

    name: str
    memory_bytes: Number
    bytes_per_second: Number
    flops_per_second: Number
    fp8_flops_per_second: Number
    link_bytes_per_second: Number
    link_latency_seconds: Number
    launch_seconds: Number

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            may_be_zero = field.name in ("link_latency_seconds", "launch_seconds")
            name = f"{field.name} of hardware {self.name!r}"
            check_range(name, getattr(self, field.name), 0, LARGEST, above=not may_be_zero)


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # 81,920 MiB; 2,039 GB/s; 312 TFLOP/s, no FP8; NVLink 3: 600 GB/s both ways.
        Hardware("a100", 81_920 * _MIB, 2.039e12, 312e12, 312e12, 300e9, 6e-6, 2e-6),
        # 81,559 MiB; 3.35 TB/s; 989.4 TFLOP/s, FP8 1,978.9; NVLink 4: 900 GB/s both ways.
        Hardware("h100", 81_559 * _MIB, 3.35e12, 989.4e12, 1978.9e12, 450e9, 6e-6, 2e-6),
        # 143,771 MiB; 4.8 TB/s; otherwise an H100.
        Hardware("h200", 143_771 * _MIB, 4.8e12, 989.4e12, 1978.9e12, 450e9, 6e-6, 2e-6),
        # 178.35 GiB; 8 TB/s (7.67 by bus width and clock); 2,250 TFLOP/s, FP8 4,500; NVLink 5: 1.8 TB/s both ways.
        Hardware("b200", 178.35 * _GIB, 8.0e12, 2250e12, 4500e12, 900e9, 6e-6, 2e-6),
        # 23,034 MiB; 300 GB/s; 121 TFLOP/s, FP8 242.5; PCIe 4 x16.
        Hardware("l4", 23_034 * _MIB, 300e9, 121e12, 242.5e12, 32e9, 20e-6, 3e-6),
        # 24,564 MiB; 1,008 GB/s; 165.2 TFLOP/s, FP8 330.3, both accumulated in float32; PCIe 4 x16.
        Hardware("rtx4090", 24_564 * _MIB, 1.008e12, 165.2e12, 330.3e12, 32e9, 20e-6, 3e-6),
        # 16 GB; 819 GB/s; 197 TFLOP/s, no FP8; ICI 400 GB/s both ways over all ports.
        Hardware("tpu-v5e", 16e9, 819e9, 197e12, 197e12, 200e9, 5e-6, 1e-6),
        # 95 GiB; 2,765 GB/s; 459 TFLOP/s, FP8 the same; ICI 1,200 GB/s both ways.
        Hardware("tpu-v5p", 95 * _GIB, 2.765e12, 459e12, 459e12, 600e9, 5e-6, 1e-6),
        # 32 GB; 1,638 GB/s; 918 TFLOP/s, no FP8; ICI 800 GB/s both ways.
        Hardware("tpu-v6e", 32e9, 1.638e12, 918e12, 918e12, 400e9, 5e-6, 1e-6),
    )
}


def hardware_named(name: str) -> Hardware:
    """Returns a row of `HARDWARE`, or for "local" the device present, measured once per process.

    Raises `ConfigError` for any other name.
    """
    if name == "local":
        return _local()
    check_choice("hardware", name, ("local", *HARDWARE))
    return HARDWARE[name]


@cache
def _local() -> Hardware:
    return measure_local()


def measure_local(size: int = 1024, copy_bytes: int = 1 << 27, rounds: int = 5) -> Hardware:
    """Measures the device present: its memory, and the rates of a large matrix product and of a large copy.

    Link bandwidth is set to memory bandwidth, since a single device has no peers.
    """
    # JAX takes seconds to import, and only this function needs it.
    import jax
    import jax.numpy as jnp

    device = jax.local_devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    square = jnp.ones((size, size), dtype)
    long = jnp.ones(copy_bytes // 4, jnp.float32)
    product, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
    product_seconds = _best_seconds(lambda: product(square).block_until_ready(), rounds)
    copy_seconds = _best_seconds(lambda: copy(long).block_until_ready(), rounds)
    # What the runtime may allocate, or on a CPU the machine's memory.
    stats = device.memory_stats() if device.platform != "cpu" else None
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bytes_per_second, flops_per_second = 2 * copy_bytes / copy_seconds, 2 * size**3 / product_seconds
    return Hardware(
        name=device.device_kind,
        memory_bytes=stats["bytes_limit"] if stats else machine_bytes,
        bytes_per_second=bytes_per_second,
        flops_per_second=flops_per_second,
        fp8_flops_per_second=flops_per_second,
        link_bytes_per_second=bytes_per_second,
        link_latency_seconds=0.0,
        launch_seconds=0.0,
    )


def _best_seconds(run: Callable[[], object], rounds: int) -> float:
    """The fewest seconds of several runs, after one that compiles."""
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def device_identity() -> dict[str, str]:
    """Device and version that measured seconds depend on; part of a stage's settings, so that another device measures
    again."""
    import jax

    device = jax.local_devices()[0]
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{_processor()}, {os.cpu_count()} cores"
    return {"device": kind, "platform": device.platform, "jax": jax.__version__}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
