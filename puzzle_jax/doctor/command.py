"""`puzzle doctor`: the facts for a bug report, and the kernel or XLA program that serves each operation here.

Kernels not yet tried on the device present are tried now (`kernels.self_check`), which takes a few seconds each.
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
    """One report about the installation.

    Attributes:
      model: config.json of the model whose operations are reported, or its directory; by default the embedded parent's.
      tokens: tokens of a batch that is scored or trained on.
      slots: positions in the cache of a layer with full attention.
      json: prints JSON instead of tables.
    """

    model: Path | None = None
    tokens: int = 4096
    slots: int = 8192
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "slots"):
            check_range(name, getattr(self, name), 1, 1 << 24)


def run(settings: DoctorSettings) -> None:
    """Prints the report. Raises CheckpointError if the model cannot be read."""
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
    """Lines that name what serves each operation, and below it why the implementations before it do not."""
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
    """Versions of Python, and of the packages of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def host() -> dict[str, Json]:
    """Operating system, cores and memory of this machine."""
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
    """The mode in which kernels are chosen, and where verdicts and compiled programs are kept."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(Path.home() / ".cache" / "puzzle_jax")
    return {
        "PUZZLE_KERNELS": self_check.mode(),
        "verdicts on kernels": str(self_check.verdicts_file()),
        "compiled programs": cache,
    }


def _verdicts(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines with the results of kernel trials on this device."""
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
