"""The compilers that plans use: XLA for CPUs, which is always available, and XLA for GPUs, which need not be present.

JAX's CUDA plugin compiles for NVIDIA GPUs with no GPU and no driver present (the extra `gpu-compiler`): memory is then
what XLA allocates on that GPU, in bfloat16, with the kernels that the product picks there. Nothing is autotuned, and
collectives' buffers and fragmentation are not counted.

XLA for CPUs stands in for an accelerator's compiler, and a program is kept like an accelerator's in three ways:

    experts    grouped matmuls are represented by their operands and results alone (`abstract.kernel_shapes`); the CPU
               implementation would gather one expert's matrices for every block of rows
    bfloat16   is replaced by float16, which is as wide; on CPUs, intermediates in bfloat16 would be held in float32
    order      the barriers of rematerialisation are kept; XLA for CPUs would merge a layer's two passes again
"""

from __future__ import annotations

import mmap
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from puzzle_jax.errors import PuzzleWarning, check_choice
from puzzle_jax.kernels.platform import lowering_for

DEVICES_PER_HOST = 8

GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200 141GB HBM3e",
    "b200": "NVIDIA B200",
    "rtx4090": "NVIDIA RTX A6000",
    "l4": "NVIDIA RTX A6000",
}
"""Names under which the CUDA plugin describes hardware to its compiler. It knows no card of the Ada generation; a
similar one of the generation before stands in for them."""

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@dataclass(frozen=True)
class Compiler:
    """XLA for CPUs.

    Attributes:
      about: a line for readers of the figures.
      dtype: the dtype that replaces bfloat16.
      stand_ins: whether grouped matmuls are represented by their shapes alone.
      options: options of `jax.stages.Lowered.compile`. They skip most optimisation of machine code, which takes longest
        and does not matter in a program that never runs.
    """

    about: str = "compiled by XLA for CPUs, in float16 for bfloat16"
    dtype: Any = jnp.float16
    stand_ins: bool = True
    options: Mapping[str, Any] = field(
        default_factory=lambda: {
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
            "xla_disable_hlo_passes": "cse_barrier_expander",
        }
    )

    def devices(self, count: int) -> Sequence[Any] | None:
        """`count` devices to compile for; None for the virtual devices of this process, made before JAX begins."""
        return None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """A context in which plans use this compiler."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)


@dataclass(frozen=True)
class GpuCompiler(Compiler):
    """XLA for a kind of GPU that need not be present.

    Attributes:
      gpu: a key of `GPUS`.
    """

    gpu: str = "h100"
    dtype: Any = jnp.bfloat16
    stand_ins: bool = False
    # CUB's radix sort asks the driver, which is not present, for scratch memory.
    options: Mapping[str, Any] = field(default_factory=lambda: {"xla_gpu_enable_cub_radix_sort": False})

    def __post_init__(self) -> None:
        about = f"compiled by XLA for {GPUS[self.gpu]} (JAX {jax.__version__}), with the kernels that serve there"
        object.__setattr__(self, "about", about)

    @cached_property
    def target(self) -> str:
        """The plugin's description of the GPU."""
        return gpu_targets()[GPUS[self.gpu]]

    @property
    def capability(self) -> str:
        """The GPU's compute capability, such as "9.0"."""
        major, minor = (re.search(rf"{part}: (\d+)", self.target) for part in ("major", "minor"))
        return f"{major[1] if major else 0}.{minor[1] if minor else 0}"

    def devices(self, count: int) -> Sequence[Any]:
        from jax.experimental import topologies

        hosts = max(1, count // DEVICES_PER_HOST)
        shape = f"1x{hosts}x{count // hosts}"
        described = topologies.get_topology_desc("", platform="cuda", target_config=self.target, topology=shape)
        return described.devices

    @contextmanager
    def in_force(self) -> Iterator[None]:
        # A program compiled for a device that is not present cannot be read back from the cache.
        cached = jax.config.values["jax_enable_compilation_cache"]
        jax.config.update("jax_enable_compilation_cache", False)
        try:
            with super().in_force(), lowering_for("gpu", self.capability):
                yield
        finally:
            jax.config.update("jax_enable_compilation_cache", cached)


_FOR_CPUS = Compiler()
_current: ContextVar[Compiler] = ContextVar("compiler", default=_FOR_CPUS)


def compiler() -> Compiler:
    """The compiler in force."""
    return _current.get()


def compiler_named(name: str, hardware: str | None) -> Compiler:
    """The compiler of this name: "cpu", or "gpu" for this hardware (h100 if None).

    Where no CUDA plugin is installed, "gpu" warns, saying how to install one, and falls back to XLA for CPUs.
    Raises ConfigError for another name, and for hardware that the plugin does not describe.
    """
    check_choice("compiler", name, ("cpu", "gpu"))
    if name == "cpu":
        return Compiler()
    check_choice("hardware (with compiler gpu)", hardware or "h100", tuple(GPUS))
    found = GpuCompiler(gpu=hardware or "h100")
    if GPUS[found.gpu] not in gpu_targets():
        warnings.warn(
            f"compiler is gpu, but no CUDA plugin of JAX that knows {GPUS[found.gpu]} is installed "
            "(pip install -e '.[gpu-compiler]'); XLA for CPUs compiles in its place",
            PuzzleWarning,
            stacklevel=2,
        )
        return Compiler()
    return found


@cache
def gpu_targets() -> dict[str, str]:
    """The GPUs that the installed CUDA plugin can compile for: name to description, as its library carries them; empty
    where no plugin is installed."""
    for name in _PLUGINS:
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:
            continue
        if spec is None or spec.origin is None:
            continue
        library = Path(spec.origin).with_name("xla_cuda_plugin.so")
        if library.exists():
            with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                texts = [found[1].decode() for found in re.finditer(rb"(gpu_device_info \{[^\x00]*)\x00", data)]
            names = (re.search(r'device_description_str: "([^"]*)"', text) for text in texts)
            return {name[1]: text for name, text in zip(names, texts, strict=True) if name}
    return {}
