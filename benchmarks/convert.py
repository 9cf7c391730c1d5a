"""Import and export of a checkpoint at real width, compared with the disk's own rates.

Writes a synthetic gpt-oss-20b of 2 layers (true width, vocabulary and expert count; 3 shards, 3.27 GB), imports it on
one device and on eight virtual ones, and exports it again, each in a process of its own. Prints MB/s and peak resident
memory: above the payload (the arrays that stay) for imports, and above the process's memory before the step for
exports. The disk's own rates are those of a plain file of the same size, written and flushed, then read with the page
cache dropped. The share of an import's time spent checking that weights are finite is printed too; it is largest if
experts are stored in bfloat16 and the system has cached the files.

    python benchmarks/convert.py --directory DIR
    python benchmarks/convert.py --directory DIR --form bf16 --experts 4 --cached
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH = dict(
    vocab_size=201_088,
    hidden_size=2_880,
    intermediate_size=2_880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    experts_per_token=4,
)
LAYERS, SHARDS = 2, 3
CHUNK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where files go; by default the system's temporary directory")
    parser.add_argument("--form", choices=("mxfp4", "bf16"), default="mxfp4", help="of the experts")
    parser.add_argument("--experts", type=int, default=32, help="in each of the two layers")
    parser.add_argument("--cached", action="store_true", help="leaves the files in the system's cache before imports")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="where to write everything")
    settings = parser.parse_args()
    if settings.step:
        print(json.dumps(STEPS[settings.step](settings.directory, settings)))
        return
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=settings.directory))
    try:
        results = {step: _in_a_process(step, root, settings) for step in STEPS}
    finally:
        shutil.rmtree(root)
    table = Table("", "seconds", "MB/s", "payload, MB", "above it, MB", "of the largest", "finite?")
    for column in table.columns[1:]:
        column.justify = "right"
    for step, found in results.items():
        row = [step, f"{found['seconds']:.1f}", f"{found['bytes'] / found['seconds'] / 1e6:,.0f}"]
        if "peak" in found:
            above = found["peak"] - found["payload"]
            row += [f"{found['payload'] / 1e6:,.0f}", f"{above / 1e6:,.0f}", f"{above / found['largest']:.2f}"]
        if "checks" in found:
            row.append(f"{found['checks'] / found['seconds']:.1%}")
        table.add_row(*row)
    Console().print(table)
    if settings.json:
        settings.json.write_text(json.dumps(results, indent=1) + "\n")


def _in_a_process(step: str, root: Path, settings: argparse.Namespace) -> dict[str, float]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if step.endswith("8 devices"):
        environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, "--step", step, "--directory", str(root)]
    command += ["--form", settings.form, "--experts", str(settings.experts), *(["--cached"] if settings.cached else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _config(experts: int):
    from puzzle_jax.config import BlockConfig, ModelConfig

    blocks = tuple(BlockConfig(experts, None if layer % 2 else 128) for layer in range(LAYERS))
    return ModelConfig(**WIDTH, blocks=blocks)  # pyright: ignore[reportArgumentType]


def make(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    """Writes a checkpoint of random bytes that are all valid: scales of 120 to 123, bfloat16 numbers of about 0.01."""
    import numpy as np

    from puzzle_jax.convert_hf.configuration.config_json import write_config
    from puzzle_jax.convert_hf.table import checkpoint_tensors
    from puzzle_jax.convert_hf.tensors.writer import Plan, PlannedTensor, write_checkpoint

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 128, CHUNK, np.uint8)

    def pieces(spec):
        for start in range(0, spec.nbytes, CHUNK):
            data = noise[: min(CHUNK, spec.nbytes - start)]
            if spec.path[-1] == "scales":
                data = data % 4 + 120
            elif spec.dtype == "BF16":
                data = np.where(np.arange(len(data)) % 2, np.uint8(0x3C), data)
            yield data

    model = _config(settings.experts)
    table = checkpoint_tensors(model, settings.form)
    tensors = [
        PlannedTensor(
            spec.name,
            spec.dtype,
            spec.shape,
            lambda spec=spec: pieces(spec),
            with_previous=spec.path[-1] == "scales",
        )
        for spec in table
    ]
    config = json.dumps(write_config(model, {}, form=settings.form)).encode()
    shard = sum(spec.nbytes for spec in table) // SHARDS + 100_000_000
    start = time.perf_counter()
    write_checkpoint(root / "model", Plan(tensors, {"config.json": config}, None, shard))
    seconds = time.perf_counter() - start
    assert len(list((root / "model").glob("*.safetensors"))) == SHARDS
    return {"seconds": seconds, "bytes": sum(spec.nbytes for spec in table)}


def disk_write(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    size, block = _bytes(root), os.urandom(CHUNK)
    start = time.perf_counter()
    with (root / "plain").open("wb", buffering=0) as file:
        for _ in range(-(-size // CHUNK)):
            file.write(block)
        os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start, "bytes": -(-size // CHUNK) * CHUNK}


def disk_read(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    path, buffer = root / "plain", bytearray(CHUNK)
    _drop(path)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    seconds, size = time.perf_counter() - start, path.stat().st_size
    path.unlink()
    return {"seconds": seconds, "bytes": size}


def load(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    import jax

    from puzzle_jax.convert_hf.load import load_checkpoint
    from puzzle_jax.convert_hf.tensors import files as tensor_files
    from puzzle_jax.model.sharding import make_mesh

    devices = len(jax.devices())
    mesh = make_mesh(1, devices) if devices > 1 else None
    jax.block_until_ready(jax.numpy.zeros(1) + 1)
    for path in (root / "model").glob("*.safetensors"):
        path.read_bytes() if settings.cached else _drop(path)
    all_finite, checks = tensor_files.all_finite, 0.0

    def timed(array) -> bool:
        nonlocal checks
        start = time.perf_counter()
        finite = all_finite(array)
        checks += time.perf_counter() - start
        return finite

    tensor_files.all_finite = timed
    before, start = _rss("VmRSS"), time.perf_counter()
    checkpoint = load_checkpoint(root / "model", mesh=mesh)
    seconds = time.perf_counter() - start
    shards = [shard.data for leaf in jax.tree.leaves(checkpoint.params) for shard in leaf.addressable_shards]
    payload = sum(shard.nbytes for shard in shards)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(checkpoint.params))
    return {
        "seconds": seconds,
        "bytes": _bytes(root),
        "payload": payload,
        "peak": _rss("VmHWM") - before,
        "largest": largest,
        "checks": checks,
    }


def export(root: Path, settings: argparse.Namespace) -> dict[str, float]:
    from puzzle_jax.convert_hf.export import export_child
    from puzzle_jax.convert_hf.tensors.files import open_tensors

    for path in (root / "model").glob("*.safetensors"):
        _drop(path)
    config = _config(settings.experts)
    before, start = _rss("VmRSS"), time.perf_counter()
    export_child(root / "model", root / "copy", config, [range(settings.experts)] * LAYERS, provenance={})
    seconds, peak = time.perf_counter() - start, _rss("VmHWM") - before
    first, second = (open_tensors(root / name).tensors for name in ("model", "copy"))
    assert set(first) == set(second)
    for name, stored in first.items():
        for one, other in zip(stored.chunks(), second[name].chunks(), strict=True):
            assert (one == other).all(), name
    largest = max(stored.nbytes for stored in first.values())
    return {"seconds": seconds, "bytes": _bytes(root), "payload": 0, "peak": peak, "largest": largest}


STEPS = {
    "make": make,
    "disk, write": disk_write,
    "disk, read": disk_read,
    "import on 1 device": load,
    "import on 8 devices": load,
    "export, byte-identical": export,
}


def _bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "model").glob("*.safetensors"))


def _drop(path: Path) -> None:
    """Drops a file from the page cache, so that reading it reads the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rss(field: str) -> int:
    """Resident bytes now (VmRSS), or their peak so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(field)


if __name__ == "__main__":
    main()
