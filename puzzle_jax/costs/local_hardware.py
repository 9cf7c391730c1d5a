"""The device present as a row of the hardware table: its memory, and the rates that two simple programs reach."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from puzzle_jax.costs.hardware import Hardware


def measure_local(size: int = 1024, copy_bytes: int = 1 << 27, rounds: int = 5) -> Hardware:
    """Rates of one large matrix product, one large copy and one empty program on the default device.

    Links are as fast as memory here: one device talks to none.
    """
    device = jax.local_devices()[0]
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    square = jnp.ones((size, size), dtype)
    long = jnp.ones(copy_bytes // 4, jnp.float32)
    product_seconds = _best_seconds(jax.jit(lambda x: x @ x), square, rounds)
    copy_seconds = _best_seconds(jax.jit(lambda x: x + 1), long, rounds)
    bytes_per_second, flops_per_second = 2 * copy_bytes / copy_seconds, 2 * size**3 / product_seconds
    return Hardware(
        name=device.device_kind,
        memory_bytes=_memory_bytes(device),
        bytes_per_second=bytes_per_second,
        flops_per_second=flops_per_second,
        fp8_flops_per_second=flops_per_second,
        link_bytes_per_second=bytes_per_second,
        link_latency_seconds=0.0,
        launch_seconds=0.0,
    )


def _memory_bytes(device: Any) -> int:
    """What the runtime may allocate, or on a CPU the machine's memory."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _best_seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, rounds: int) -> float:
    function(x).block_until_ready()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        function(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best
