"""The weights that `expert_mlp` works on."""

from __future__ import annotations

from typing import NamedTuple

from puzzle_jax.kernels.mxfp4 import MXFP4
from puzzle_jax.kernels.shapes import Array, Float


class Experts(NamedTuple):
    """One layer's experts.

    Attributes:
      gate_up: [experts, hidden, 2 * intermediate], gate and linear columns interleaved; dense or packed.
      gate_up_bias: [experts, 2 * intermediate].
      down: [experts, intermediate, hidden]; dense or packed.
      down_bias: [experts, hidden].
    """

    gate_up: Float[Array, "experts hidden two_inter"] | MXFP4
    gate_up_bias: Float[Array, "experts two_inter"]
    down: Float[Array, "experts inter hidden"] | MXFP4
    down_bias: Float[Array, "experts hidden"]
