"""Processes that score together, as a rule one per host, over JAX's distributed runtime.

The first process runs the search and writes its files. The others hold the parent's weights on their own devices and
wait for work: what the first one says is run by all of them, each on its share, and every one gets all results. They
read the parent and nothing else, so the run's directory may be on the first one's own disk.

How they find each other is said in `puzzle_jax.processes`. A process that dies takes the others with it, within a
minute at most; the search goes on from its files when it is started again.

Left out: a mesh over several hosts. The parent must fit into the memory of one process's devices.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Shaped

from puzzle_jax.processes import hear, join_processes, tell

_DISMISSED = -1


@dataclass
class Team:
    """The processes of one search; alone unless `join` made it.

    Used as a context, whose end sends the others home.

    Attributes:
      count: of processes.
      index: of this one; 0 leads.
    """

    count: int = 1
    index: int = 0
    _said: int = field(default=0, repr=False)

    @staticmethod
    def join(count: int, local_devices: int) -> Team:
        """Waits until all `count` processes are there. Must come before anything that asks JAX for devices.

        Args:
          local_devices: that this process uses, where it needs more than the one that some launchers give it.

        Raises ConfigError where JAX does not know the other processes, or knows another number of them.
        """
        join_processes(count, local_devices)
        return Team(count, jax.process_index()) if count > 1 else Team()

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.count > 1 and self.index == 0:
            tell(self._key(), str(_DISMISSED))

    def say(self, work: Any) -> None:
        """Tells the others what to do now; by the first process."""
        if self.count > 1:
            message = np.frombuffer(pickle.dumps(work), np.uint8)
            tell(self._key(), str(len(message)))
            self._said += 1
            multihost_utils.broadcast_one_to_all(message)

    def hear(self) -> Any:
        """What the first process says next, however long that takes; None when there is no more to do."""
        size = int(hear(self._key()))
        if size == _DISMISSED:
            return None
        self._said += 1
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
        return f"puzzle_jax: {self._said}"
