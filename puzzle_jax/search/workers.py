"""Processes that score together, usually one per host, over JAX's distributed runtime.

The primary process runs the search and writes its files. The others, its workers, hold the parent's weights on their
own devices and wait for work: each broadcast of the primary process is executed by all of them, each on its share, and
all of them get all results. Workers read nothing but the parent, so the run directory may be on the primary process's
own disk.

`puzzle_jax.processes.distributed` describes how processes find each other and end together. A search that is started
again resumes from its files.

Left out: a mesh over several hosts. The parent must fit into the memory of one process's devices.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from puzzle_jax.evaluate.models import Model
from puzzle_jax.processes.distributed import joined, kv_get, kv_set, process_index

_DISMISSED = -1


@dataclass
class Team:
    """The processes of one search; a single one unless made by `join`.

    Attributes:
      count: number of processes.
      index: number of this process; 0 is the primary one.
    """

    count: int = 1
    index: int = 0
    _sent: int = field(default=0, repr=False)

    @staticmethod
    @contextmanager
    def join(count: int, local_devices: int, *, program: str) -> Iterator[Team]:
        """A context in which the processes work together (`joined`); leaving it dismisses the workers."""
        with joined(count, local_devices, program=program):
            team = Team(count, process_index()) if count > 1 else Team()
            yield team
            if team.count > 1 and team.index == 0:
                kv_set(team._key(), str(_DISMISSED))

    def broadcast(self, work: object) -> None:
        """Has the workers begin the work that the primary process is about to do itself."""
        if self.count > 1:
            message = np.frombuffer(pickle.dumps(work), np.uint8)
            kv_set(self._key(), str(len(message)))
            self._sent += 1
            multihost_utils.broadcast_one_to_all(message)

    def receive(self) -> Any:
        """Waits, however long, for the next broadcast of the primary process; None when there is no more work."""
        size = int(kv_get(self._key()))
        if size == _DISMISSED:
            return None
        self._sent += 1
        message = multihost_utils.broadcast_one_to_all(np.zeros(size, np.uint8))
        return pickle.loads(np.asarray(message).tobytes())

    def gathered(self, values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "processes ..."]:
        """The values of every process, which must have the same shape, in all of them."""
        if self.count == 1:
            return values[None]
        # As bytes: JAX would make 64-bit numbers 32-bit ones.
        everything = multihost_utils.process_allgather(np.frombuffer(values.tobytes(), np.uint8))
        return np.asarray(everything).view(values.dtype).reshape(self.count, *values.shape)

    def _key(self) -> str:
        return f"puzzle_jax: {self._sent}"


def run_worker(team: Team, parent: Model) -> None:
    """Takes part in everything that the primary process broadcasts, until there is no more work."""
    while (work := team.receive()) is not None:
        work.join(team, parent.params, parent.mesh)
