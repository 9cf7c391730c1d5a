"""`puzzle doctor`: what a bug report should say, and which kernel or XLA program serves each operation here.

Kernels that were not yet tried on the device present are tried (`kernels.self_check`), which takes some seconds each.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from puzzle_jax.config import ModelConfig
from puzzle_jax.consoles import plain_console
from puzzle_jax.convert_hf.configuration.config_json import parse_config
from puzzle_jax.convert_hf.tensors.files import read_json
from puzzle_jax.doctor.operations import choice, operations
from puzzle_jax.environment import KERNELS, LIBRARIES
from puzzle_jax.errors import check_range
from puzzle_jax.files import Json
from puzzle_jax.kernels import self_check
from puzzle_jax.kernels.platform import target_platform
from puzzle_jax.search.recipe import EMBEDDED_PARENT

PACKAGES = (
    "puzzle-jax", "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "numpy", "scipy", "flax",
    "optax", "orbax-checkpoint", "transformers", "vllm",
)  # fmt: skip

GB = 1e9


@dataclass(frozen=True)
class DoctorSettings:
    """What is asked.

    Attributes:
      model: config.json, or a directory that has one; its operations are asked about, or else the embedded parent's.
      tokens: of a batch that is scored or trained on.
      slots: positions of a full layer's cache.
      json: prints JSON in the place of tables.
    """

    model: Path | None = None
    tokens: int = 4096
    slots: int = 8192
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "slots"):
            check_range(name, getattr(self, name), 1, 1 << 24)


def run(settings: DoctorSettings) -> None:
    """Prints it all. Raises ConfigError where the model cannot be read."""
    config = _model(settings.model)
    found: dict[str, Any] = {
        "versions": versions(),
        "host": host(),
        "devices": devices(),
        "kernels": kernels(),
        "operations": [
            {"what": operation.name, **choice(operation)._asdict()}
            for operation in operations(config, settings.tokens, settings.slots)
        ],
        "verdicts": {key: asdict(verdict) for key, verdict in self_check.read_verdicts().items()},
    }
    if settings.json:
        print(json.dumps(found, indent=2))
        return
    out = plain_console()
    for name in ("versions", "host", "kernels"):
        for key, value in found[name].items():
            out.print(f"{key:<22} {value}", highlight=False, soft_wrap=True)
        out.print()
    for line in found["devices"]:
        out.print(line, highlight=False, soft_wrap=True)
    out.print()
    for line in (*_served(found["operations"]), *_verdicts(found["verdicts"])):
        out.print(line, highlight=False, soft_wrap=True)


def _served(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What serves each operation, and below it why those before it in the order do not."""
    for each in found:
        yield f"{each['what']:<52} {each['chosen']}"
        for name, reason in each["refusals"].items():
            if name not in LIBRARIES and KERNELS.get(name, target_platform()) == target_platform():
                yield f"    {name}: {reason}"
    others = {name: platform for name, platform in KERNELS.items() if platform != target_platform()}
    if others:
        yield "for other devices: " + ", ".join(f"{name} ({platform.upper()})" for name, platform in others.items())
    yield "by name only: " + ", ".join(LIBRARIES)


def _model(path: Path | None) -> ModelConfig:
    source = EMBEDDED_PARENT if path is None else path
    source = source / "config.json" if source.is_dir() else source
    return parse_config(read_json(source), source)


def versions() -> dict[str, str]:
    """Python, and the packages of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Json]:
    """The machine that this runs on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if sys.platform != "win32" else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(), "cores": cores, "memory": f"{memory / GB:.1f} GB"}


def devices() -> list[str]:
    """A line for each device of this process."""
    lines = []
    for device in jax.local_devices():
        stats = (device.memory_stats() if device.platform != "cpu" else None) or {}
        memory = f", {stats['bytes_limit'] / GB:.1f} GB may be taken" if "bytes_limit" in stats else ""
        capability = getattr(device, "compute_capability", None)
        about = f", compute capability {capability}" if capability else ""
        lines.append(f"device {device.id}: {device.device_kind}, {device.platform}{about}{memory}")
    return lines


def kernels() -> dict[str, Json]:
    """What chooses kernels, and where files are kept."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "puzzle_jax")
    return {
        "PUZZLE_KERNELS": self_check.mode(),
        "verdicts on kernels": str(self_check.verdicts_file()),
        "compiled programs": cache,
    }


def _verdicts(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """What trials of kernels on this device found."""
    if found:
        yield ""
        yield "kernels that were tried on this device:"
    for key, verdict in found.items():
        if verdict["reason"]:
            yield f"{key}: left out: {verdict['reason']}"
            continue
        own, of_xla = verdict["seconds"], verdict["xla_seconds"]
        times = ", ".join(f"{own[what] / of_xla[what]:.2f} of XLA's time {what}" for what in own)
        yield f"{key}: error {verdict['error']:.1e} where XLA has {verdict['xla_error']:.1e}; {times}"
