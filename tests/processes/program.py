"""python -m tests.processes.program MODULE ARGUMENTS: `python -m MODULE ARGUMENTS` with the test process's speed-ups.

It collects garbage rarely and compiles as the process that runs the tests does (see tests/conftest.py).
"""

import gc
import runpy
import sys

from tests.lowering import reuse_contexts
from tests.program_cache import write_programs_whole


def compile_quickly() -> None:
    gc.set_threshold(50_000, 20, 20)
    reuse_contexts()
    write_programs_whole()


if __name__ == "__main__":
    compile_quickly()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
