"""Checks the shapes and types of every public function, and keeps compiled programs between runs.

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

from tests.compiler_flags import EIGHT_DEVICES, QUICK
from tests.lowering import reuse_contexts
from tests.program_cache import LEAST_SECONDS, write_programs_whole
from tests.type_checks import install

# The slowest files, slowest first: started last, one of them would keep one worker busy after the other is done.
LONGEST = tuple(
    f"tests/{name}.py"
    for name in (
        "run/test_run",
        "train/grpo/test_run",
        "search/test_processes",
        "train/distill/test_run",
        "search/test_pipeline",
        "generate/test_engine",
        "train/grpo/test_policy",
        "model/test_network",
        "test_readme",
        "train/pretrain/test_run",
        "model/test_weights",
        "kernels/test_self_check",
        "kernels/test_expert_mlp",
        "tasks/rewards/test_workers",
        "kernels/test_attention",
    )
)
LARGE_BYTES = 5 << 30  # of one process; beyond this, programs that are no longer used are dropped

os.environ.setdefault("PUZZLE_JAX_CACHE", tempfile.mkdtemp(prefix="puzzle_jax_cache_"))
os.environ.setdefault("XLA_FLAGS", f"{EIGHT_DEVICES} {QUICK}")
# Without bytecode, every process that a test starts would compile the package's modules again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Programs started in the background inherit an ignored SIGINT; those that tests start must not.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Commands keep compiled programs here too, in this process and in those that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(LEAST_SECONDS))
jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
jax.config.update("jax_platforms", "cpu")
# Nobody reads the source locations of operations, in this process or in those that tests start.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
jax.config.update("jax_traceback_in_locations_limit", 0)

install("puzzle_jax")
reuse_contexts()
write_programs_whole()

# The same cases in every run; `pytest --hypothesis-profile=default` draws others.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Imports Torch and other runtimes only if tests that need them are asked for."""
    left_out = [mark for mark in ("parity", "runtimes") if f"not {mark}" in config.option.markexpr]
    return True if collection_path in [Path(__file__).parent / mark for mark in left_out] else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(LONGEST)))


def pytest_collection_finish() -> None:
    """Exempts imported modules from garbage collection, and collects seldom, since tracing makes many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


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
