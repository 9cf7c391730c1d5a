"""Marks and lists that select the kernel tests which can run here."""

import jax
import pytest

from puzzle_jax.environment import KERNELS, LIBRARIES
from puzzle_jax.kernels.expert_mlp import IMPLEMENTATIONS
from puzzle_jax.kernels.mosaic import FIRST_JAX

GPU = pytest.mark.skipif(jax.__version_info__[:3] < FIRST_JAX, reason="Mosaic GPU kernels need a newer JAX")
"""For tests that interpret or lower GPU kernels; they need no GPU."""

MIXTURES_ON_CPU = [name for name in IMPLEMENTATIONS if name not in ("ragged_dot", "looped", *KERNELS, *LIBRARIES)]
"""Implementations of `expert_mlp` that the tests run on CPUs."""
