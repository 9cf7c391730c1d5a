"""Several processes as one program, as a rule one per host, over JAX's distributed runtime.

How processes find each other is JAX's own affair under Slurm, Open MPI, Kubernetes and on TPU pods. Elsewhere each is
started with JAX_COORDINATOR_ADDRESS (host:port of the first one) and JAX_PROCESS_ID (0, 1, ...).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

from puzzle_jax.errors import ConfigError, PuzzleError

_ADDRESS, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"
# A process that is gone is noticed after so long, and not waited for longer at the end.
_HEARTBEAT_SECONDS, _SHUTDOWN_SECONDS = 60, 10
_POLL_MS = 60_000
_DONE, _REFUSED = "+", "-"  # before what the first process tells


def join_processes(count: int, local_devices: int = 1) -> None:
    """Waits until all `count` processes are there. Must come before anything that asks JAX for devices.

    Args:
      count: of processes, `mesh.processes` of a recipe; nothing is done for one.
      local_devices: that this process uses, where it needs more than the one that some launchers give it.

    Raises ConfigError where JAX does not know the other processes, or knows another number of them.
    """
    if count == 1:
        return
    given: dict[str, Any] = {}
    if _INDEX in os.environ:
        given = {"num_processes": count, "process_id": _index(os.environ[_INDEX], count)}
    if local_devices > 1:
        given["local_device_ids"] = list(range(local_devices))
    try:
        jax.distributed.initialize(
            **given, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"mesh.processes is {count}, but they cannot be brought together ({' '.join(str(error).split())}); "
            f"start them by Slurm or Open MPI, or each with {_ADDRESS} and {_INDEX}"
        ) from error
    if jax.process_count() != count:
        raise ConfigError(f"mesh.processes is {count}, but {jax.process_count()} were started")


def tell(key: str, value: str) -> None:
    """Tells all processes a value, once for a key."""
    _store().key_value_set(key, value)


def hear(key: str) -> str:
    """The value that a process tells, however long that takes, unlike a wait in a collective operation."""
    while True:
        try:
            return _store().blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def forget(key: str) -> None:
    """Drops what was told, once all have heard it; nothing is done where nothing was told."""
    if jax.process_count() > 1:
        _store().key_value_delete(key)


def from_first(what: str, work: Callable[[], str]) -> str:
    """What the first process finds, in all of them; the others wait for it.

    Args:
      what: it is, once in a program.

    Raises PuzzleError in all processes where `work` does in the first.
    """
    if jax.process_count() == 1:
        return work()
    if jax.process_index() == 0:
        try:
            found = work()
        except PuzzleError as error:
            tell(what, f"{_REFUSED}{error}")
            raise
        tell(what, f"{_DONE}{found}")
        return found
    said = hear(what)
    if said.startswith(_REFUSED):
        raise PuzzleError(said.removeprefix(_REFUSED))
    return said.removeprefix(_DONE)


def by_first(what: str, work: Callable[[], object]) -> None:
    """The first process does what one alone shall do; the others wait for it. See `from_first`."""

    def done() -> str:
        work()
        return ""

    from_first(what, done)


def _store() -> Any:
    """Keys and values that all processes see; JAX has no public name for it."""
    from jax._src.distributed import global_state

    return global_state.client


def _index(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(f"{_INDEX} is {text!r}, but must be from 0 to {count - 1} (mesh.processes is {count})")
    return int(text)
