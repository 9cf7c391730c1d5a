"""A whole search on a full-size gpt-oss-20b on the machine at hand: memory and seconds of every step.

Writes a random gpt-oss-20b of all 24 layers at true width (13.8 GB in shards, experts in MXFP4) with the embedded
parent's chat files, loads it, and runs `puzzle search` on it as users do: traces of a few short answers, ranking, lens
and exact scores of a few layers' alternatives on one trace, the integer program, the child's export. The child is then
exported once more and the copies are compared layer by layer (`convert_hf verify`). Every command is a process of its
own; its peak resident memory is printed beside its seconds. Answers and choices mean nothing: the benchmark shows that
every step of a search runs at this size, and the memory and time that it takes.

    python benchmarks/full_size.py --directory DIR
    python benchmarks/full_size.py --directory DIR --layers 4

Left out: quality and the child's speed, which a random model cannot show.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from puzzle_jax.config import BlockConfig, ModelConfig
from puzzle_jax.convert_hf.configuration.config_json import write_config
from puzzle_jax.convert_hf.table import TensorSpec, checkpoint_tensors
from puzzle_jax.convert_hf.tensors.writer import Plan, PlannedTensor, write_checkpoint
from puzzle_jax.tasks.chat.embedded import write_chat_files

WIDTH = dict(
    vocab_size=201_088,
    hidden_size=2_880,
    intermediate_size=2_880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    experts_per_token=4,
)
LAYERS, EXPERTS, WINDOW = 24, 32, 128
SCORED = 4
"""Number of layers at the end that have alternatives; the third layer has some, too."""
CHUNK = 16 << 20
SHARD_BYTES = 4_000_000_000

SEARCH = {
    "traces.tasks": "chain",
    "traces.efforts": "low",
    "traces.calibration": "2",
    "traces.validation": "1",
    "traces.confirmation": "1",
    "traces.heldout": "1",
    "traces.max_tokens": "low=3",
    "traces.batch_size": "4",
    "space.fractions": "[1, 0.5]",
    "space.windows": "[16]",
    "score.first": "1",
    "score.keep_sets": "1",
    "score.per_call": "2",
    "score.tokens_per_batch": "256",
    "scenario": "name=chat,input_tokens=160,output_tokens=128,batch=16,hardware=rtx4090",
    "target": "max_expert_bytes_ratio=0.95",
    "solve.solutions": "1",
    "refine": "rounds=0,swaps=0",
    "evaluate.baselines": "[]",
    "evaluate.problems": "1",
    "evaluate.rounds": "0",
    "costs": "roofline",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where 35 GB of files go; by default the system's temporary one")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--weights", default="auto", choices=("auto", "packed", "dense"))
    parser.add_argument("--keep", action="store_true", help="leaves the files there")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write everything")
    settings = parser.parse_args()
    if settings.load:
        _load(settings.load, settings.weights)
        return
    root = Path(tempfile.mkdtemp(prefix="full-size-", dir=settings.directory))
    try:
        found = _steps(root, settings)
    finally:
        if not settings.keep:
            shutil.rmtree(root)
    table = Table("step", "seconds", "peak of resident memory, GB")
    for column in table.columns[1:]:
        column.justify = "right"
    for step, values in found.items():
        table.add_row(step, f"{values['seconds']:,.1f}", f"{values['peak'] / 1e9:.2f}" if "peak" in values else "")
    Console().print(table)
    if settings.json:
        settings.json.write_text(json.dumps(found, indent=1) + "\n")


def _steps(root: Path, settings: argparse.Namespace) -> dict[str, dict[str, float]]:
    parent, run, again = root / "parent", root / "run", root / "again"
    start = time.perf_counter()
    size = make(parent, settings.layers)
    print(f"{size / 1e9:.2f} GB of weights in {len(list(parent.glob('*.safetensors')))} shards", flush=True)
    found = {"write the parent": {"seconds": time.perf_counter() - start}}
    found["load"] = _run(__file__, "--load", parent, "--weights", settings.weights)
    options = [f"--{name}={value}" for name, value in SEARCH.items()]
    fixed = [layer for layer in range(settings.layers - SCORED) if layer != 2]
    listed = ", ".join(map(str, fixed))
    pinned = {"layers": listed, "min_experts": EXPERTS, "windows": ["full", WINDOW]}
    options.append(f"--space.restrict={json.dumps([pinned] if fixed else [])}")
    options += [f"--parent={parent}", f"--run={run}", f"--weights={settings.weights}"]
    found["search"] = _run("-m", "puzzle_jax.search", *options)
    for record in sorted(run.glob("*/stage.json"), key=lambda path: path.stat().st_mtime):
        stage = json.loads(record.read_text())
        found[f"  {stage['name']}"] = {"seconds": stage["seconds"]}
    found["export once more"] = _run(
        "-m", "puzzle_jax.convert_hf", "export", "--checkpoint", run / "child", "--out", again
    )
    found["verify"] = _run("-m", "puzzle_jax.convert_hf", "verify", run / "child", again)
    return found


def _run(*command: str | Path) -> dict[str, float]:
    """Runs a command; returns its seconds and its peak resident memory."""
    arguments = [sys.executable, *map(str, command)]
    start = time.perf_counter()
    process = subprocess.Popen(arguments, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {"seconds": time.perf_counter() - start, "peak": usage.ru_maxrss * 1024}


def _load(directory: Path, weights: str) -> None:
    """Loads a model as every verb does."""
    import jax

    from puzzle_jax.convert_hf.describe import describe_checkpoint
    from puzzle_jax.convert_hf.load import load_weights

    start = time.perf_counter()
    params = jax.block_until_ready(load_weights(describe_checkpoint(directory), weights=weights))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.perf_counter() - start
    print(f"{size / 1e9:.2f} GB in memory after {seconds:.1f} s, {(own - size) / 1e9:.2f} GB beside them at most")


def make(directory: Path, layers: int) -> int:
    """Writes a random checkpoint whose forward pass is finite, and returns the bytes of its tensors."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(CHUNK // 2).astype(np.float32)
    codes = rng.integers(0, 256, CHUNK, np.uint8)

    def pieces(spec: TensorSpec) -> Iterator[np.ndarray]:
        for start in range(0, spec.nbytes, CHUNK):
            count = min(CHUNK, spec.nbytes - start)
            if spec.path[-1] == "scales":
                yield rng.integers(118, 122, count).astype(np.uint8)
            elif spec.dtype == "U8":
                yield np.roll(codes, int(rng.integers(CHUNK)))[:count]
            else:
                values = np.roll(normal, int(rng.integers(CHUNK // 2)))[: count // 2] * 0.02
                values = values + 1 if "norm" in spec.name else values
                yield values.astype(ml_dtypes.bfloat16).view(np.uint8)

    blocks = tuple(BlockConfig(EXPERTS, None if layer % 2 else WINDOW) for layer in range(layers))
    config = ModelConfig(**WIDTH, blocks=blocks)  # pyright: ignore[reportArgumentType]
    table = checkpoint_tensors(config, "mxfp4")
    tensors = [
        PlannedTensor(
            spec.name, spec.dtype, spec.shape, lambda spec=spec: pieces(spec), with_previous=spec.path[-1] == "scales"
        )
        for spec in table
    ]
    content = json.dumps(write_config(config, {"eos_token_id": 1, "pad_token_id": 0}, form="mxfp4")).encode()
    write_checkpoint(directory, Plan(tensors, {"config.json": content}, None, SHARD_BYTES))
    write_chat_files(directory)
    return sum(spec.nbytes for spec in table)


if __name__ == "__main__":
    main()
