"""Keeps compiled programs for other processes, small ones too, and writes each of them atomically.

Processes that tests start compile what others have compiled, mostly in less time than JAX thinks worth keeping. JAX
writes a program's file in place: a reader meanwhile, or after the writer was killed, finds half a program.
"""

import os
import tempfile
from pathlib import Path

from jax._src import lru_cache

LEAST_SECONDS = 0.0
"""Least compile time of a program to keep. One operation compiles in ten milliseconds, is written and read in two."""


def write_programs_whole() -> None:
    """Takes effect from now on, and does nothing where JAX no longer has the class."""
    cache = getattr(lru_cache, "LRUCache", None)
    if cache is None:
        return

    def put(self, key: str, value: bytes) -> None:
        path = Path(self.path) / f"{key}{lru_cache._CACHE_SUFFIX}"
        if not path.exists():
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(value)
            os.replace(file.name, path)

    cache.put = put
