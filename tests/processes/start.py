"""Starts programs once per process, as on several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.waiting import HANG


@contextmanager
def running(*commands: Sequence[str], **environment: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts `python -m` for each command, as processes of one program; kills those that still run at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.processes.program", *command],
            env={**environment, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]], timeout: float = HANG) -> list[subprocess.CompletedProcess[str]]:
    """Exit code and output of each process, once all have ended."""
    printed = [process.communicate(timeout=timeout) for process in processes]
    return [
        subprocess.CompletedProcess([], process.returncode, *texts)
        for process, texts in zip(processes, printed, strict=True)
    ]
