"""Common parts of the Mosaic GPU kernels: where they run, how they are launched, how shared memory holds tiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from puzzle_jax.kernels.platform import is_hopper, target_platform
from puzzle_jax.kernels.shapes import Array, Float, Ref

FIRST_JAX = (0, 11, 2)


def plgpu() -> ModuleType:
    """Pallas' Mosaic GPU module, imported only when a kernel is built, since nothing else needs it."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def hopper_only(interpret: bool = False) -> None:
    """Raises NotImplementedError below JAX 0.11.2 and, unless interpreted, if the device is not a Hopper GPU."""
    if jax.__version_info__[:3] < FIRST_JAX:
        raise NotImplementedError(f"needs JAX {'.'.join(map(str, FIRST_JAX))}, but this is {jax.__version__}")
    if not interpret and not is_hopper():
        raise NotImplementedError(f"for GPUs of compute capability 9.0, but this is {target_platform()}")


def swizzled(columns: int, bits: int = 16) -> tuple[object, ...]:
    """Transforms of a tile whose rows have so many numbers of so many bits, for wgmma to read and TMA to write it."""
    mosaic = plgpu()
    swizzle = mosaic.find_swizzle(columns * bits)
    return mosaic.TilingTransform((8, swizzle * 8 // bits)), mosaic.SwizzleTransform(swizzle)


def product(left: Ref, right: Ref, rows: int, columns: int) -> Float[Array, "rows columns"]:
    """One wgmma product, accumulated in float32."""
    mosaic = plgpu()

    def run(total: Ref) -> Float[Array, "rows columns"]:
        mosaic.wgmma(total, left, right)
        return total[...]

    return pl.run_scoped(run, mosaic.ACC((rows, columns), jnp.float32))


def stored(*copies: tuple[Ref, Ref]) -> None:
    """Copies tiles from shared to global memory and waits for the copies to finish."""
    mosaic = plgpu()
    mosaic.commit_smem()
    for source, target in copies:
        mosaic.copy_smem_to_gmem(source, target)
    mosaic.wait_smem_to_gmem(0)


def launched(
    kernel: Callable[..., None],
    outputs: object,
    grid: Mapping[str, int],
    scratch: Sequence[object],
    interpret: bool,
    warpgroups: Mapping[str, int] | None = None,
) -> Callable[..., Array]:
    """A function that runs a kernel with one program per point of a named grid; `warpgroups` names the axis of a
    program's warpgroups and gives their number."""
    mosaic = plgpu()
    axis, count = next(iter((warpgroups or {}).items()), (None, None))
    return mosaic.kernel(
        kernel,
        out_type=outputs,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        num_threads=count,
        thread_name=axis,
        compiler_params=mosaic.CompilerParams(lowering_semantics=mosaic.LoweringSemantics.Warpgroup),
        interpret=mosaic.InterpretGPUParams() if interpret else None,
    )
