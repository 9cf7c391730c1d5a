"""Processes that score together, as a rule one per host, over JAX's distributed runtime.

The primary process runs the search and writes its files. The others, its workers, hold the parent's weights on their
own devices and wait: what the primary one broadcasts is run by all of them, each on its share, and every one gets all
results. They read the parent and nothing else, so the run's directory may be on the primary one's own disk.

How they find each other, and that they end together, is said in `puzzle_jax.processes.distributed`; the search goes on
from its files when it is started again.

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

from puzzle_jax.processes.distributed import joined, kv_get, kv_set, process_index

_DISMISSED = -1


@dataclass
class Team:
    """The processes of one search; one alone unless `join` made it.

    Attributes:
      count: of processes.
      index: of this one; 0 is the primary one.
    """

    count: int = 1
    index: int = 0
    _sent: int = field(default=0, repr=False)

    @staticmethod
    @contextmanager
    def join(count: int, local_devices: int, *, program: str) -> Iterator[Team]:
        """The time in which the processes work together (`joined`); its end dismisses the workers."""
        with joined(count, local_devices, program=program):
            team = Team(count, process_index()) if count > 1 else Team()
            yield team
            if team.count > 1 and team.index == 0:
                kv_set(team._key(), str(_DISMISSED))

    def broadcast(self, work: Any) -> None:
        """Lets the workers begin some work, as the primary process is about to do."""
        if self.count > 1:
            message = np.frombuffer(pickle.dumps(work), np.uint8)
            kv_set(self._key(), str(len(message)))
            self._sent += 1
            multihost_utils.broadcast_one_to_all(message)

    def receive(self) -> Any:
        """What the primary process broadcasts next, however long that takes; None when there is no more to do."""
        size = int(kv_get(self._key()))
        if size == _DISMISSED:
            return None
        self._sent += 1
        message = multihost_utils.broadcast_one_to_all(np.zeros(size, np.uint8))
        return pickle.loads(np.asarray(message).tobytes())

    def gathered(self, values: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "processes ..."]:
        """Every process's values, which have the same shape, in all of them."""
        if self.count == 1:
            return values[None]
        # As bytes: JAX would make 64-bit numbers 32-bit ones.
        everything = multihost_utils.process_allgather(np.frombuffer(values.tobytes(), np.uint8))
        return np.asarray(everything).view(values.dtype).reshape(self.count, *values.shape)

    def _key(self) -> str:
        return f"puzzle_jax: {self._sent}"
