"""A process that ends together with everything it started, however that was started.

A process group loses what starts a session of its own, and the children of a process that ends are reparented to init.
So a supervisor stands between the main program and the process that does the work. On Linux it is a "child subreaper":
every descendant of the worker stays its descendant, can be found through /proc, and is killed when the worker ends or
the supervisor is terminated. Nothing else is killed: a process is sent a signal only through a handle that was opened
before its parent was looked up. On other systems only the worker's process group is killed.

This module imports nothing but the standard library, so that the supervisor is a small process.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time
from contextlib import suppress

_LOOK_SECONDS = 0.5
_KILL_SECONDS = 5.0
_HAS_PROC = sys.platform == "linux" and os.path.exists("/proc/self/stat")
_SET_PARENT_DEATH_SIGNAL, _SET_CHILD_SUBREAPER = 1, 36  # options of prctl, from linux/prctl.h


def supervise(parent: int) -> int:
    """Forks this process, which must have a single thread. Returns only in the new process, the worker.

    The supervisor waits. When the worker ends, it kills the worker's descendants and ends as the worker did (with the
    same exit code, or by the same signal). On SIGTERM, or when the process `parent` is no longer its parent, it kills
    the worker and all descendants, and itself by SIGKILL. The worker is killed when the supervisor ends.

    Returns the process id of the supervisor.
    """
    supervisor = os.getpid()
    _prctl(_SET_CHILD_SUBREAPER, 1)
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    terminated = False

    def terminate(*_: object) -> None:
        nonlocal terminated
        terminated = True

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    worker = os.fork()
    if not worker:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(wake)
        os.close(woken)
        os.setpgid(0, 0)
        _prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)
        return supervisor

    # The end of the worker must close its channel, which is its standard input.
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    while not terminated and os.getppid() == parent:
        select.select([wake], [], [], _LOOK_SECONDS)
        with suppress(BlockingIOError):
            os.read(wake, 4096)
        status = _reap(worker)
        if status is not None:
            _kill_all(worker)
            _end_as(status)
    _kill_all(worker)
    os.kill(supervisor, signal.SIGKILL)
    raise AssertionError("SIGKILL ends a process")


def descendants(root: int) -> list[int]:
    """The process ids of all running descendants of the process `root`.

    Empty on systems without a /proc like that of Linux.
    """
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if _HAS_PROC else ():
        if name.isdecimal() and (parent := _parent(int(name))) is not None:
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    waiting = list(children.get(root, ()))
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.append(pid)
            waiting += children.get(pid, ())
    return found


def kill_descendants(root: int) -> None:
    """Kills the descendants of `root` until there are none, for a few seconds at most. If `root` is this process,
    none is left as a zombie either."""
    end = time.monotonic() + _KILL_SECONDS
    while time.monotonic() < end:
        found = descendants(root)
        for pid in found:
            _kill(pid, {root, *found})
        if root == os.getpid():
            _reap(None)
        if not found and (root != os.getpid() or not _has_children()):
            return
        time.sleep(0.002)


def _kill_all(worker: int) -> None:
    if _HAS_PROC:
        kill_descendants(os.getpid())
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)


def _kill(pid: int, family: set[int]) -> None:
    """Kills a process whose parent is one of the family."""
    if not hasattr(os, "pidfd_open"):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
        return
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            # The id may be another process's by now; its parent is then no member of the family.
            if _parent(pid) in family:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)


def _parent(pid: int) -> int | None:
    """The parent of a process that is running; None if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the program's name in parentheses, which may hold anything.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(parent)


def _reap(worker: int | None) -> int | None:
    """Reaps children that have ended; returns the worker's wait status if it is among them."""
    found = None
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == worker:
                found = status
    return found


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _end_as(status: int) -> None:
    """Ends this process in the way that the wait status describes."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        with suppress(ImportError, ValueError, OSError):
            import resource

            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 128 - code)


def _prctl(option: int, value: int) -> None:
    """Calls prctl, if there is one."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0)
