"""Registers, spills and shared memory of compiled kernels, read from the files that JAX writes to `DUMP`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DUMP = Path(tempfile.mkdtemp(prefix="gpu-aot-"))

REGISTERS, SHARED_PER_SM = 65_536, 233_472
RESERVED, WARPGROUP = 1_024, 128
"""Registers and bytes of shared memory of a multiprocessor; bytes of the latter that the runtime reserves for each
program; threads of a warpgroup."""


@dataclass(frozen=True)
class MachineCode:
    """The resources of one kernel, as ptxas and Mosaic report them.

    Attributes:
      spills: bytes of registers spilled to memory.
      shared: bytes of shared memory.
      threads: threads of a program.
      wgmma: tensor-core instructions in the code.
    """

    registers: int
    spills: int
    shared: int
    threads: int
    wgmma: int

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        by_registers = REGISTERS // (self.registers * self.threads)
        return min(by_registers, SHARED_PER_SM // (self.shared + RESERVED))


def machine_code(before: set[Path]) -> Iterator[MachineCode]:
    """Yields the resources of the kernels that were compiled after `before` was listed."""
    for path in sorted(set(DUMP.glob("*.ptxas")) - before):
        text, passes, code = (path.with_suffix(suffix) for suffix in (".ptxas", ".mlir-passes.log", ".sass_ctrl"))
        said, log = text.read_text(), passes.read_text()
        registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
        shared = re.search(r"mosaic_gpu\.smem_bytes = (\d+)", log)
        threads = re.findall(r"threads\([^)]*\) in \(%\S+ = %c(\d+)", log)
        body = code.read_text() if code.exists() else ""
        passes.unlink()  # tens of MB each
        found = [int(match[1]) if match else 0 for match in (registers, spills, shared)]
        own = int(threads[-1]) if threads else WARPGROUP
        yield MachineCode(found[0], found[1], found[2], own, body.count("HGMMA"))
