"""Environment variables that apply to all verbs. This module does not import JAX."""

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
"""Names of the implementations that are kernels, with the platform of each."""

LIBRARIES = ("tokamax", "dew_flash_attn")
"""Names of the implementations from other projects' libraries. They are extras, and used only when named."""


def chosen_kernels(known: Collection[str] = (*KERNELS, *LIBRARIES)) -> str:
    """The value of PUZZLE_KERNELS: "auto", "off" or the name of a kernel or library. Raises ConfigError for others."""
    chosen = os.environ.get("PUZZLE_KERNELS") or "auto"
    if chosen not in ("auto", "off", *known):
        raise ConfigError(f"PUZZLE_KERNELS is {chosen!r}, but must be auto, off, or one of {', '.join(known)}")
    return chosen
