"""Shapes and types of every public function are checked, and compiled programs are kept between runs."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("PUZZLE_JAX_CACHE", tempfile.mkdtemp(prefix="puzzle_jax_cache_"))
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
from jaxtyping import install_import_hook

CACHE = Path(__file__).parent.parent / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_platforms", "cpu")

install_import_hook("puzzle_jax", "beartype.beartype")
