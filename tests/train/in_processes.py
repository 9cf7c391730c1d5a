"""Training commands that are started once per process, as on several hosts with a device each."""

import subprocess

from tests.processes.start import ended, running

# Compilation is most of what such a test costs; nothing of this changes values by more than rounding.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def in_processes(count: int, *command: str, flags: str = "") -> list[subprocess.CompletedProcess]:
    """How each process of `python -m puzzle_jax.train ...` ended; `flags` are XLA's."""
    one = ["puzzle_jax.train", *command, "--mesh.processes", str(count)]
    with running(*[one] * count, XLA_FLAGS=flags) as processes:
        return ended(processes)
