"""Scenarios by name and from files.

    h100x8-64k        8 H100s, prompts and answers of 65,536 tokens each, an FP8 KV cache, the best batch that fits
    h100x8-64k-bf16   the same with a bfloat16 cache

A name combines any hardware of `hardware.HARDWARE`, any number of devices and any length in units of 1,024 tokens.
Other deployments are YAML files with the fields of `Scenario`; a file without a name field names the scenario after
itself.
"""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

from puzzle_jax.codec import from_plain
from puzzle_jax.costs.hardware import HARDWARE
from puzzle_jax.costs.scenario import Scenario
from puzzle_jax.errors import ConfigError
from puzzle_jax.files import read_yaml

KV_BYTES = {"fp8": 1, "bf16": 2}
USUAL_DEVICES, USUAL_LENGTHS = (1, 8), (4, 64)

_NAME = re.compile(r"(?P<hardware>[a-z0-9-]+)x(?P<devices>\d+)-(?P<length>\d+)k(?:-(?P<kv>[a-z0-9]+))?")


def scenario_names() -> tuple[str, ...]:
    """The usual names; others of the same form work too."""
    usual = product(HARDWARE, USUAL_DEVICES, USUAL_LENGTHS)
    return tuple(f"{hardware}x{devices}-{length}k" for hardware, devices, length in usual)


def get_scenario(text: str) -> Scenario:
    """Returns a scenario by name, or from the YAML file at a path.

    Raises `PuzzleError` if the text is neither; for an invalid file, the error names file, field and value.
    """
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
        return read_scenario(Path(text))
    found = _NAME.fullmatch(text)
    if found is None or found["hardware"] not in HARDWARE or found["kv"] not in (None, *KV_BYTES):
        raise ConfigError(
            f"scenario is {text!r}, but must be a YAML file or a name such as h100x8-64k: hardware "
            f"({', '.join(HARDWARE)}), 'x', devices, '-', thousands of tokens in and out, 'k', "
            f"and perhaps -{' or -'.join(KV_BYTES)} for the cache"
        )
    length = 1024 * int(found["length"])
    return Scenario(
        name=text,
        input_tokens=length,
        output_tokens=length,
        kv_bytes_per_value=KV_BYTES[found["kv"] or "fp8"],
        hardware=found["hardware"],
        devices=int(found["devices"]),
    )


def read_scenario(path: Path) -> Scenario:
    """Reads a scenario from a YAML file of its fields.

    Raises `PuzzleError`, naming the file and what is wrong in it.
    """
    data = read_yaml(path)
    named = {"name": path.stem, **data} if isinstance(data, dict) else data
    return from_plain(Scenario, named, str(path), exact=True)
