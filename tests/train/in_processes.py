"""Training commands that are started once per process, as on several hosts with one device each."""

import subprocess

from tests.compiler_flags import QUICK
from tests.processes.start import ended, running


def in_processes(count: int, *command: str, flags: str = QUICK) -> list[subprocess.CompletedProcess]:
    """Runs `count` processes of `python -m puzzle_jax.train ...` to their end; `flags` are XLA's."""
    one = ["puzzle_jax.train", *command, "--mesh.processes", str(count)]
    with running(*[one] * count, XLA_FLAGS=flags) as processes:
        return ended(processes)
