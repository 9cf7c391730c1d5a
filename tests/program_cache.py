"""Compiled programs are kept for other processes, small ones too, and are there whole or not at all.

Processes that tests start compile what others have compiled, most of it in less time than JAX thinks worth keeping. JAX
writes a program's file in place: who reads it meanwhile, or after its writer was killed, finds half a program.
"""

import os
import tempfile
from pathlib import Path

from jax._src import lru_cache

LEAST_SECONDS = 0.0
"""Of compiling. A program of one operation takes ten milliseconds, to write it two and to read it two."""


def write_programs_whole() -> None:
    """From now on; where JAX has no such class any more, nothing is different."""
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
