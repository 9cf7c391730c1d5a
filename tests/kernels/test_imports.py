"""Kernels need jax and numpy, and nothing else that is installed here."""

import subprocess
import sys

SCRIPT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jaxtyping", "beartype", "flax", "optax", "rich", "safetensors", "yaml"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import jax.numpy as jnp
from puzzle_jax.kernels import chunk_attention, decode_attention, expert_mlp, float8, grouped_matmul, mxfp4, route
from puzzle_jax.kernels import window_attention

rows, weights = jnp.ones((4, 8)), jnp.ones((2, 8, 3))
out = grouped_matmul.grouped_matmul(rows, weights, jnp.array([1, 2]))
print(out.sum(), "jaxtyping" in sys.modules)
sys.path.insert(0, "benchmarks")
sys.argv = ["kernels.py", "--small", "--rounds", "1", "--only", "experts"]
import kernels
kernels.main()
"""


def test_kernels_and_their_benchmark_run_with_jax_and_numpy_alone():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, *rest = run.stdout.splitlines()
    assert first == "72.0 False"  # three rows of eight ones, three outputs each
    shown = [line.split()[0] for line in rest if "% of the floor" in line]
    assert shown == ["dense", "ours", "buffer", "ragged_dot"] * 2
