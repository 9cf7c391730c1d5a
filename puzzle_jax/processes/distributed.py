"""Several processes that act as one program, usually one per host, over JAX's distributed runtime.

Under Slurm, Open MPI, Kubernetes and on TPU pods, JAX itself lets processes find each other. Elsewhere each is started
with JAX_COORDINATOR_ADDRESS (host:port of the primary one) and JAX_PROCESS_ID (0, 1, ...).

Everything that several processes do together happens within `joined`. They agree there on what they work on, and end
together: whatever one of them refuses, all refuse with the same sentence, and the loss of one ends the others
(`puzzle_jax.processes.watchdog`). Process 0 is the primary one, which writes files and reports.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import jax
from rich.console import Console

from puzzle_jax.errors import ConfigError, PuzzleError, shown
from puzzle_jax.files import Json
from puzzle_jax.processes.relay import HEARTBEAT_SECONDS, host_and_port, relayed
from puzzle_jax.processes.watchdog import FAILED, INTERRUPTED, REFUSED, Ending, Watchdog, end_now
from puzzle_jax.runs import differences, version

Result = TypeVar("Result")

JOIN_SECONDS = 300
"""Time within which all processes must have been started."""

_ADDRESS, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"
_WATCHDOG = "puzzle_jax/watchdog"
_WATCHDOG_SECONDS = 60
_SHUTDOWN_SECONDS = 60
_OPEN_SECONDS = 3600  # for a process to read what it works on, from the slowest disk
_VERDICT_SECONDS = 2  # within which an error proves to be due to another process's end
_POLL_MS = 5_000
_DONE, _REFUSED = "+", "-"  # prefixes of what the primary process publishes
_LISTED = 3
_LEAST_THREADS = 32


class JointError(PuzzleError):
    """An error that all processes of a program raise, in the same words."""


@contextmanager
def joined(count: int, local_devices: int = 1, *, program: str) -> Iterator[None]:
    """The context in which `count` processes are one program. Must be entered before anything asks JAX for devices.

    It ends in all of them together: when the last one finishes, or the first one fails.

    Args:
      count: number of processes (`mesh.processes` of a recipe); with one, nothing is done.
      local_devices: number of devices that this process uses, if more than the one that some launchers give it.
      program: precedes what is printed when another process ends this one.

    Raises:
      ConfigError: JAX does not find the other processes, or finds another number of them.
      JointError: the versions of package and JAX, or the platform, differ between the processes.
    """
    if count == 1:
        yield
        return
    _initialize(count, local_devices, program)
    watchdog = _watchdog(program)
    try:
        _begin_together()
        yield
        watchdog.finish()
    except BaseException as error:
        _leave(watchdog, error)


def agree(what: str, value: Mapping[str, Json]) -> None:
    """Checks that a value, made of JSON values and paths, is equal in all processes.

    `what` names it in messages, and is unique in a program. Raises JointError in all processes, which names what
    differs and in which process.
    """
    if process_count() == 1:
        return
    published = _gathered(f"agree/{what}", value)
    for index, (host, other) in enumerate(published):
        if found := list(differences(published[0][1], other)):
            places = [
                f"{path} is {shown(one)} in process 0 and {shown(two)} in process {index}" for path, one, two in found
            ]
            more = [f"{len(places) - _LISTED} more"] if len(places) > _LISTED else []
            raise JointError(
                f"process {index} (host {host}) differs from process 0 (host {published[0][0]}) in {what}: "
                f"{'; '.join(places[:_LISTED] + more)}"
            )


def on_all(what: str, work: Callable[[], Result]) -> Result:
    """The result of `work` in this process, once it has succeeded in all; `what` names it, and is unique in a program.

    Raises JointError in all processes if `work` raises a PuzzleError in any.
    """
    if process_count() == 1:
        return work()
    result, refused = None, None
    try:
        result = work()
    except PuzzleError as error:
        refused = str(error)
    published = _gathered(f"on_all/{what}", {"refused": refused})
    sentences = [found["refused"] for _, found in published]
    for index, sentence in enumerate(sentences):
        if sentence is not None:
            everywhere = all(other == sentence for other in sentences)
            raise JointError(sentence if everywhere else _in_process(sentence, index, published[index][0]))
    return result  # type: ignore[return-value]


def from_primary(what: str, work: Callable[[], str]) -> str:
    """Returns, in all processes, the result of `work` in the primary one; `what` names it, and is unique in a program.

    Raises PuzzleError in all processes if `work` does in the primary one.
    """
    if process_count() == 1:
        return work()
    if process_index() == 0:
        try:
            found = work()
        except PuzzleError as error:
            kv_set(what, f"{_REFUSED}{error}")
            raise
        kv_set(what, f"{_DONE}{found}")
        return found
    published = kv_get(what)
    if published.startswith(_REFUSED):
        raise JointError(published.removeprefix(_REFUSED))
    return published.removeprefix(_DONE)


def on_primary(what: str, work: Callable[[], object]) -> None:
    """Does `work` in the primary process only; the others wait for it. See `from_primary`."""

    def done() -> str:
        work()
        return ""

    from_primary(what, done)


# Key-value store ----------------------------------------------------------------------------------------------------


def kv_set(key: str, value: str) -> None:
    """Publishes a value to all processes; a key can be set only once."""
    _state().client.key_value_set(key, value)


def kv_get(key: str, seconds: float | None = None) -> str:
    """The value that a process publishes under a key.

    Waits for `seconds`, then raises TimeoutError; without a limit, it waits for as long as all processes are alive,
    unlike a collective operation.
    """
    began = time.monotonic()
    while True:
        try:
            return _state().client.blocking_key_value_get(key, _POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        if seconds is not None and time.monotonic() - began > seconds:
            raise TimeoutError(key)


def kv_delete(key: str) -> None:
    """Deletes a published value, once all have read it; does nothing in a single process."""
    if process_count() > 1:
        _state().client.key_value_delete(key)


def _gathered(key: str, value: Mapping[str, Json]) -> list[tuple[str, Json]]:
    """The host and value of every process, in all of them."""
    kv_set(f"{key}/{process_index()}", json.dumps([socket.gethostname(), value], default=str))
    found = []
    for index in range(process_count()):
        try:
            found.append(tuple(json.loads(kv_get(f"{key}/{index}", _OPEN_SECONDS))))
        except TimeoutError:
            raise PuzzleError(
                f"process {index} has not come as far as the others ({key}) within {_OPEN_SECONDS // 60} minutes"
            ) from None
    return found


# Beginning and end --------------------------------------------------------------------------------------------------


def _initialize(count: int, local_devices: int, program: str) -> None:
    """Connects the processes through JAX."""
    given: dict[str, Json] = {}
    if _INDEX in os.environ:
        given = {"num_processes": count, "process_id": _index(os.environ[_INDEX], count)}
    if local_devices > 1:
        given["local_device_ids"] = list(range(local_devices))
    how = f"start them by Slurm or Open MPI, or each with {_ADDRESS} and {_INDEX}"
    late = f"mesh.processes is {count}, but not all of them were started within {JOIN_SECONDS} seconds; {how}"
    # JAX's own limit ends in an abort.
    limit = threading.Timer(JOIN_SECONDS, end_now, [program, Ending(REFUSED, late)])
    limit.daemon = True
    limit.start()
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM
    # XLA runs programs on one thread per core. A program that waits for its inputs holds one, and on few cores, where
    # a process has several CPU devices, none was left for a program that other processes waited for.
    os.environ.setdefault("PJRT_NPROC", str(max(_LEAST_THREADS, os.cpu_count() or 1)))
    try:
        with relayed():
            jax.distributed.initialize(
                **given,
                initialization_timeout=2 * JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"mesh.processes is {count}, but they cannot be brought together ({' '.join(str(error).split())}); {how}"
        ) from error
    finally:
        limit.cancel()
    if process_count() != count:
        raise ConfigError(f"mesh.processes is {count}, but {process_count()} were started")


def _begin_together() -> None:
    """Makes all processes initialise their devices, which each of them can do only when the others do."""
    agree("the installation", {"puzzle_jax": version("puzzle_jax"), "jax": jax.__version__})
    agree("the devices", {"platform": jax.local_devices()[0].platform})


def _watchdog(program: str) -> Watchdog:
    """This process's connections to the others."""
    if process_index() == 0:
        return Watchdog.lead(program, process_count(), lambda value: kv_set(_WATCHDOG, value))
    try:
        published = kv_get(_WATCHDOG, _WATCHDOG_SECONDS)
    except TimeoutError:
        end_now(program, Ending(FAILED, "process 0 was lost while all were being brought together"))
    host, _ = host_and_port(_state().coordinator_address)
    return Watchdog.follow(program, process_index(), host, published)


def _leave(watchdog: Watchdog, error: BaseException) -> NoReturn:
    """Ends the other processes with the message of an error of this one, and raises it."""
    name = watchdog.name(watchdog.index)
    if isinstance(error, PuzzleError):
        if watchdog.index and not isinstance(error, JointError):
            error = PuzzleError(_in_process(str(error), watchdog.index, watchdog.hosts[watchdog.index]))
        ending, seconds = Ending(REFUSED, str(error)), 0.0
    elif isinstance(error, KeyboardInterrupt):
        ending, seconds = Ending(INTERRUPTED, f"{name} was interrupted"), 0.0
    else:
        summary = (str(error).splitlines() or [""])[0]
        sentence = f"{name} failed with {type(error).__name__}: {shown(summary)}; its own output says more"
        ending, seconds = Ending(FAILED, sentence), _VERDICT_SECONDS
    watchdog.leave(ending, seconds)
    _forsake()
    raise error


def _forsake() -> None:
    """Keeps JAX from waiting for the other processes when this one ends, and from aborting when they do not come."""
    state = _state()
    for part in (state.client, state.service, state.preemption_sync_manager):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))  # never destroyed, since that would wait, too
    state.client = state.service = state.preemption_sync_manager = None


def process_index() -> int:
    """The number of this process; 0 is the primary one."""
    return _state().process_id


def process_count() -> int:
    """The number of processes that are one program; 1 for a single process."""
    return _state().num_processes


def primary_console(console: Console) -> Console:
    """The console in the primary process, which reports for all; one that prints nothing in the others."""
    return Console(quiet=True) if process_index() else console


def _state() -> Any:
    """JAX's record of the processes, which does not initialise devices; it has no public name."""
    from jax._src.distributed import global_state

    return global_state


def _in_process(sentence: str, index: int, host: str) -> str:
    return f"{sentence} (in process {index}, host {host})"


def _index(text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise ConfigError(f"{_INDEX} is {text!r}, but must be from 0 to {count - 1} (mesh.processes is {count})")
    return int(text)
