"""Scales of an FP8 key-value cache in a checkpoint: one pair of numbers per layer.

They are written as `model.layers.N.self_attn.k_scale` and `.v_scale`, 0-dimensional F32, the form that runtimes read.
The names `...self_attn.k_proj.k_scale` and `...v_proj.v_scale` and the shape [1] are read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32

from puzzle_jax.convert_hf.tensors.files import StoredTensor
from puzzle_jax.convert_hf.tensors.writer import PlannedTensor

StoredScales = Float32[np.ndarray, "2 layers"]
"""Scales of the keys, then of the values, by layer."""

_NAME = re.compile(r"model\.layers\.([0-9]{1,9})\.self_attn\.(?:([kv])_scale|([kv])_proj\.\3_scale)")
_FLOATS = ("BF16", "F16", "F32")


def is_kv_scale(name: str) -> bool:
    """Returns whether a tensor of this name is a scale of the cache."""
    return _NAME.fullmatch(name) is not None


def read_kv_scales(tensors: Mapping[str, StoredTensor], layers: int) -> tuple[StoredScales | None, list[str]]:
    """The scales among a checkpoint's tensors, and what is wrong with them.

    Returns:
      The scales, None when there are none at all, and one message for each scale that is missing, of the wrong
      shape or type, not above 0, or given twice with different values.
    """
    values: dict[tuple[str, int], float] = {}
    problems = []
    for name, stored in sorted(tensors.items()):
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        if stored.shape not in ((), (1,)) or stored.dtype not in _FLOATS:
            problems.append(f"{name} is {stored.dtype} of shape {list(stored.shape)}, but a scale is one float")
            continue
        key = (match[2] or match[3], int(match[1]))
        value = float(np.asarray(stored.read()).astype(np.float32).reshape(()))
        if not 0 < value < np.inf:
            problems.append(f"{name} is {value}, but a scale must be above 0 and finite")
        elif values.setdefault(key, value) != value:
            problems.append(f"{name} is {value}, but another tensor gives {values[key]} for the same layer")
    if not values and not problems:
        return None, []
    wanted = [(kind, layer) for layer in range(layers) for kind in "kv"]
    if not problems:
        problems += [
            f"model.layers.{layer}.self_attn.{kind}_scale is missing, but other layers have theirs"
            for kind, layer in wanted
            if (kind, layer) not in values
        ]
        problems += [
            f"layer {layer} has a {kind}_scale, but the model has {layers} layers"
            for kind, layer in values
            if layer >= layers
        ]
    if problems:
        return None, problems
    return np.asarray([[values[kind, layer] for layer in range(layers)] for kind in "kv"], np.float32), []


def planned_kv_scales(scales: StoredScales | None) -> list[PlannedTensor]:
    """The tensors in which scales are written."""
    if scales is None:
        return []
    return [
        PlannedTensor(f"model.layers.{layer}.self_attn.{kind}_scale", "F32", (), lambda value=value: [value[None]])
        for layer in range(scales.shape[1])
        for kind, value in zip("kv", scales[:, layer], strict=True)
    ]
