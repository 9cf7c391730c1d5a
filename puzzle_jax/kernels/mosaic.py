"""What the Mosaic GPU kernels share: where they run, and how tiles lie in shared memory."""

from __future__ import annotations

from typing import Any

import jax

from puzzle_jax.kernels.platform import is_hopper, target_platform

FIRST_JAX = (0, 11, 2)


def plgpu() -> Any:
    """Pallas' Mosaic GPU module, which is imported where a kernel is made: elsewhere nothing of it is needed."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def hopper_only(interpret: bool = False) -> None:
    """Raises NotImplementedError below JAX 0.11.2, and, unless interpreted, where the device is no Hopper GPU."""
    if jax.__version_info__[:3] < FIRST_JAX:
        raise NotImplementedError(f"needs JAX {'.'.join(map(str, FIRST_JAX))}, but this is {jax.__version__}")
    if not interpret and not is_hopper():
        raise NotImplementedError(f"for GPUs of compute capability 9.0, but this is {target_platform()}")


def swizzled(columns: int, bits: int = 16) -> tuple[Any, ...]:
    """Transforms of a tile with rows of so many numbers, such that wgmma can read it and TMA write it."""
    mosaic = plgpu()
    swizzle = mosaic.find_swizzle(columns * bits)
    return mosaic.TilingTransform((8, swizzle * 8 // bits)), mosaic.SwizzleTransform(swizzle)
