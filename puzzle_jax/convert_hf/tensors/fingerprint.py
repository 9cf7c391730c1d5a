"""One hash of a checkpoint's content, by which runs, records and processes distinguish models.

It covers the configuration, as far as it is part of the function, and every tensor's name, type, shape and bytes. It
does not depend on how tensors are spread over files or on other keys of config.json, so that a copy, or the same model
in other shards, is the same model. A checkpoint of up to `WHOLE_BYTES` is hashed whole. Of a larger one, tensors of up
to `TENSOR_BYTES` are hashed whole, and each of the others by blocks spread evenly over it, two for every expert and at
least 64, both ends included: whatever changes values in bulk, such as training, merging, pruning and rounding, changes
some of them, and less than a hundredth of the bytes is read. A few values changed by hand in a large tensor may go
unnoticed; noticing them would take reading tens of gigabytes.

Fingerprints are cached by path, sizes and times of the files, in the process and under $PUZZLE_JAX_CACHE or
~/.cache/puzzle_jax. Cache entries that are damaged or cannot be written are ignored; the cache is not used for files
written within the last seconds, since their times do not yet distinguish versions. Nothing here imports JAX.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from puzzle_jax import codec
from puzzle_jax.convert_hf.describe import Description, describe_checkpoint
from puzzle_jax.convert_hf.other_forms import CONFIG
from puzzle_jax.convert_hf.tensors.files import Stored
from puzzle_jax.errors import PuzzleError
from puzzle_jax.files import write_beside

VERSION = 1
"""Incremented whenever what is hashed changes; records of another version are ignored."""
WHOLE_BYTES = 64 << 20
TENSOR_BYTES = 256 << 10
_BLOCK_BYTES = 4 << 10
_BLOCKS, _BLOCKS_OF_AN_EXPERT = 64, 2
_SETTLED_SECONDS = 5.0
_FINGERPRINT = re.compile("[0-9a-f]{32}")

State = tuple[tuple[str, int, int, int], ...]
"""Name, size, and times of modification and status change in nanoseconds, of every file."""


def weights_fingerprint(directory: Path | str) -> str:
    """The fingerprint of the model in a checkpoint directory, 32 hexadecimal digits.

    Raises `CheckpointError` where there is none, or it is damaged.
    """
    return fingerprint_of(describe_checkpoint(directory))


def fingerprint_of(description: Description) -> str:
    """`weights_fingerprint` of a checkpoint that was described already; raises where it can no longer be read."""
    state = _state(description)
    return _kept(description.directory.resolve(), state) if _settled(state) else _hash(description)


@lru_cache(maxsize=256)
def _kept(directory: Path, state: State) -> str:
    """The fingerprint of files in this state: recorded by an earlier process, or computed now and recorded."""
    place = _place(directory)
    fingerprint = _recorded(place, state)
    if fingerprint is None:
        description = describe_checkpoint(directory)
        fingerprint = _hash(description)
        if _state(description) == state:
            _record(place, state, fingerprint)
    return fingerprint


def _hash(description: Description) -> str:
    digest = hashlib.sha256(f"{VERSION} {description.form}\n".encode())
    digest.update(json.dumps(asdict(description.config), sort_keys=True).encode())
    whole = sum(tensor.nbytes for tensor in description.tensors.values()) <= WHOLE_BYTES
    for name, tensor in sorted(description.tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        small = whole or tensor.nbytes <= TENSOR_BYTES
        for piece in tensor.chunks() if small else tensor.bytes_at(sampled(tensor)):
            digest.update(piece.data)
    if description.kv_scales is not None:
        digest.update(b"\nkv scales\n" + description.kv_scales.tobytes())
    return digest.hexdigest()[:32]


def sampled(tensor: Stored) -> list[tuple[int, int]]:
    """Offsets and lengths of the blocks of a large tensor that are hashed."""
    experts = tensor.shape[0] if len(tensor.shape) > 2 else 0
    count = max(_BLOCKS, _BLOCKS_OF_AN_EXPERT * experts)
    last = tensor.nbytes - _BLOCK_BYTES
    places = sorted({last * index // (count - 1) for index in range(count)})
    return [(place, _BLOCK_BYTES) for place in places]


def _state(description: Description) -> State:
    """Distinguishes versions of the files without reading them; empty where one is gone."""
    files = {source.file for tensor in description.tensors.values() for source in tensor.sources}
    try:
        stats = [(path.name, path.stat()) for path in sorted({*files, description.directory / CONFIG})]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats)


def _settled(state: State) -> bool:
    newest = max((max(times) for _, _, *times in state), default=time.time_ns())
    return time.time_ns() - newest > _SETTLED_SECONDS * 1e9


def _place(directory: Path) -> Path:
    root = os.environ.get("PUZZLE_JAX_CACHE") or os.path.expanduser("~/.cache/puzzle_jax")
    return Path(root) / "fingerprints" / f"{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}.json"


@dataclass(frozen=True)
class _Record:
    files: State
    fingerprint: str
    version: int = 0


def _recorded(place: Path, state: State) -> str | None:
    """The fingerprint that an earlier process found for files in this state."""
    with suppress(PuzzleError):
        record = codec.read(_Record, place)
        if (record.version, record.files) == (VERSION, state) and _FINGERPRINT.fullmatch(record.fingerprint):
            return record.fingerprint
    return None


def _record(place: Path, state: State, fingerprint: str) -> None:
    """Keeps a fingerprint for later processes; a place that cannot be written is no reason to stop."""
    with suppress(OSError, ValueError):
        if place.parts[0] == "~":  # the home directory is unknown
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        write_beside(place, json.dumps(codec.to_plain(_Record(state, fingerprint, VERSION))).encode())
