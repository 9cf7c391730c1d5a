"""Training commands that are started once per process, as on several hosts with a device each."""

import os
import socket
import subprocess
import sys

# Compilation is most of what such a test costs; nothing of this changes values by more than rounding.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def in_processes(count: int, *command: str, flags: str = "") -> list[subprocess.CompletedProcess]:
    """How each process of `python -m puzzle_jax.train ...` ended; `flags` are XLA's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "puzzle_jax.train", *command, "--mesh.processes", str(count)],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *texts)
        for process, texts in zip(processes, said, strict=True)
    ]
