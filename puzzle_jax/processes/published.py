"""Values that the primary process computes for all processes, as they could differ from process to process.

    published   bytes of any length
    decided     JSON values: choices of a solver with a time limit, what is done next
    values_of   the primary process's values of an array that every process has computed: devices of different hosts may
                round differently, and all processes must decide the same

All processes make the same calls in the same order, which numbers the calls. The others wait for the primary process
over the key-value store, however long its work takes; only then is there a collective operation, which would not wait.
A single process gets its own value back without either.

Left out: errors of the primary process's work, which end all processes (`puzzle_jax.processes.watchdog`).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from puzzle_jax.processes.distributed import kv_delete, kv_get, kv_set, process_count, process_index

_PART_BYTES = 16 << 20  # broadcast over the devices at a time
_LEAST_BYTES = 1 << 10

_numbers = itertools.count()  # of calls in this process; processes form one program only once


def published(work: Callable[[], bytes]) -> bytes:
    """Returns, in all processes, what `work` returns in the primary one; the others do not call it."""
    if process_count() == 1:
        return work()
    key = f"published/{next(_numbers)}"
    if process_index() == 0:
        content = work()
        kv_set(key, str(len(content)))
    else:
        content = bytes(int(kv_get(key)))
    found = b"".join(_broadcast(content[at : at + _PART_BYTES]) for at in range(0, max(1, len(content)), _PART_BYTES))
    if process_index() == 0:
        kv_delete(key)  # all have read it, since the broadcast needs all of them
    return found


def decided(work: Callable[[], Any]) -> Any:
    """Like `published`, for a JSON value; with several processes, it comes back with lists in place of tuples."""
    if process_count() == 1:
        return work()
    return json.loads(published(lambda: json.dumps(work()).encode()))


def values_of(values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The primary process's values of an array, whose shape and dtype are the same in all processes."""
    if process_count() == 1:
        return values
    return np.frombuffer(published(values.tobytes), values.dtype).reshape(values.shape)


def _broadcast(part: bytes) -> bytes:
    """Broadcasts a part, equally long in all processes; padded to a power of two, so that few programs are compiled."""
    size = _LEAST_BYTES
    while size < len(part):
        size *= 2
    sent = np.frombuffer(part.ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(sent)).tobytes()[: len(part)]
