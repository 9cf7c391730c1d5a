"""Environment variables that choose for all verbs. No JAX."""

from __future__ import annotations

import os
from collections.abc import Collection

from puzzle_jax.errors import ConfigError

KERNELS = {
    "mosaic_gpu_wide": "gpu",
    "mosaic_gpu_fused": "gpu",
    "mosaic_gpu": "gpu",
    "mosaic_tpu": "tpu",
    "splash": "tpu",
}
"""Names of implementations that are kernels, and the platform of each."""

LIBRARIES = ("tokamax", "dew_flash_attn")
"""Names of implementations that are other projects' libraries. They are extras, and serve by name only."""


def chosen_kernels(known: Collection[str] = (*KERNELS, *LIBRARIES)) -> str:
    """PUZZLE_KERNELS: "auto", "off" or the name of a kernel or library. Raises ConfigError for anything else."""
    chosen = os.environ.get("PUZZLE_KERNELS") or "auto"
    if chosen not in ("auto", "off", *known):
        raise ConfigError(f"PUZZLE_KERNELS is {chosen!r}, but must be auto, off, or one of {', '.join(known)}")
    return chosen
