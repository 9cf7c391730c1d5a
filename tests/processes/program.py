"""python -m tests.processes.program MODULE ARGUMENTS: `python -m MODULE ARGUMENTS` that seldom looks for garbage.

Tracing makes many objects and little garbage, as tests/conftest.py says of the process that runs tests.
"""

import gc
import runpy
import sys

if __name__ == "__main__":
    gc.set_threshold(50_000, 20, 20)
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
