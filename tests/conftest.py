"""Shapes and types of every public function are checked, and compiled programs are kept between runs.

Programs are compiled with fewer optimisations than users get (`tests.compiler_flags`).
"""

import gc
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

from tests.compiler_flags import EIGHT_DEVICES, QUICK

LARGE_BYTES = 3 << 30  # of a process; programs that are no longer used are dropped beyond it

os.environ.setdefault("PUZZLE_JAX_CACHE", tempfile.mkdtemp(prefix="puzzle_jax_cache_"))
os.environ.setdefault("XLA_FLAGS", f"{EIGHT_DEVICES} {QUICK}")
# Programs that are started in the background inherit that interrupts are ignored; those that tests start shall not.
signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where an operation comes from

install_import_hook("puzzle_jax", "beartype.beartype")

# The same cases in every run; `pytest --hypothesis-profile=default` draws others.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded():
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > LARGE_BYTES and _resident_bytes() > LARGE_BYTES:
        jax.clear_caches()
        gc.collect()


def _resident_bytes() -> int:
    if sys.platform != "linux":
        return LARGE_BYTES + 1
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
