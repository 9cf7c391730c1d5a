"""A model's weights as training holds them: stacked by runs of equal layers, in place, once."""

from __future__ import annotations

import warnings
from pathlib import Path

import jax

from puzzle_jax.convert_hf.load import load_checkpoint
from puzzle_jax.model.network import compute_dtype
from puzzle_jax.model.sharding import on_mesh
from puzzle_jax.model.spec import Params
from puzzle_jax.train.placement import Placement
from puzzle_jax.train.student import Student


def load_base(directory: Path, student: Student, placement: Placement, *, packed: bool | None) -> Params:
    """The weights of `student`'s parent, stacked.

    Args:
      packed: whether experts stay packed as the checkpoint holds them; None: wherever they run on no CPU.
    """
    packed = packed if packed is not None else jax.default_backend() != "cpu"
    loaded = load_checkpoint(
        directory, dtype=compute_dtype(), mesh=placement.mesh, experts="stored" if packed else "dense"
    )
    with on_mesh(placement.mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # but their memory is released
        stacked = jax.jit(student.stacked, donate_argnums=0)(loaded.params)
    return placement.base(stacked, student.child.parent)
