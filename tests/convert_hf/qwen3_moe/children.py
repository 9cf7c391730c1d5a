"""Children of these tests' parents, and helpers that tests of both share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax.convert_hf.export import export_child
from puzzle_jax.model.child import Child, ChildBlock
from tests.convert_hf.checkpoints import stored_bytes
from tests.convert_hf.qwen import BF16, Storage, qwen_config

CONFIG = qwen_config()
KEPT = ((0, 2, 3, 5, 6), (), (1, 4), tuple(range(7)))
WINDOWS = (5, None, 9, None)
ONE_COUNT = ((1, 2, 6), (), (0, 3, 4), (2, 5, 6))


def bf16(array: Any) -> np.ndarray:
    return np.asarray(array).astype(BF16).astype(np.float32)


def storage_of(directory: Path) -> Storage:
    names = stored_bytes(directory)
    fused = any(name.endswith("experts.gate_up_proj") for name in names)
    return "fused" if fused else "fp8" if any(name.endswith("_scale_inv") for name in names) else "experts"


def view(kept=KEPT, windows=WINDOWS, **changes: Any) -> Child:
    return Child(CONFIG, tuple(map(ChildBlock, kept, windows)), **changes)


def uniform(**changes: Any) -> Child:
    return view(ONE_COUNT, (None,) * 4, **changes)


def export(parent: Path, out: Path, child: Child, **options: Any) -> Path:
    record = {"seed": 7}
    delta = child.dense_delta
    export_child(parent, out, child.config, child.kept, provenance=record, dense_delta=delta, **options)
    return out


def edit(directory: Path, file: str, **changes: Any) -> None:
    data = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps({**data, **changes}))
