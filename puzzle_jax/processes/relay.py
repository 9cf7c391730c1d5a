"""A relay for JAX's connection to its coordination service, so that losing the service aborts no process from C++.

JAX's client aborts the whole process (SIGABRT, after a stack trace) the moment its connection to the coordination
service breaks, and no option of JAX 0.10 to 0.12 changes that: `jax_enable_recoverability` concerns the service, and a
callback for missed heartbeats cannot be a Python function. So the client is given a socket of its own process, and two
threads forward the bytes to the service and back. When the service is gone, the client's end stays open and idle, and
`puzzle_jax.processes.watchdog` ends the process with a sentence.

JAX's own heartbeats, whose absence aborts a process in the same way, get a timeout so long that they do not matter.

Left out: connections by mutual TLS, whose certificates name the service's host; they stay as JAX makes them.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 7 * 24 * 3600
"""Heartbeat timeout after which JAX would abort the processes; the watchdog acts long before."""

_RETRY_SECONDS = 0.2
_CHUNK = 1 << 16


@contextmanager
def relayed() -> Iterator[None]:
    """Within this context, clients that JAX makes for its coordination service are connected through a relay."""
    runtime: Any = import_module("jaxlib._jax")  # what `jax.distributed` calls
    make = runtime.get_distributed_runtime_client
    directories: list[Path] = []

    def make_relayed(address: str, *arguments: Any, **options: Any) -> Any:
        if not options.get("mtls_cert_file"):
            # A Unix socket, since gRPC may send TCP connections to a proxy, even those to the same host.
            directories.append(Path(tempfile.mkdtemp(prefix="puzzle-")))
            start_relay(directories[-1] / "socket", address)
            address = f"unix:{directories[-1] / 'socket'}"
        return make(address, *arguments, **options)

    runtime.get_distributed_runtime_client = make_relayed
    try:
        yield
    finally:
        runtime.get_distributed_runtime_client = make
        for directory in directories:  # an established connection does not need the socket's path
            shutil.rmtree(directory, ignore_errors=True)


def start_relay(path: Path, address: str) -> None:
    """Accepts connections at `path` and forwards each to `address` ("host:port"), in threads that end with the process.

    Connecting is retried until it succeeds; from then on, the end at `path` is never closed from here.
    """
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=_carry, args=(near, host_and_port(address)), daemon=True).start()

    threading.Thread(target=accept, name="relay", daemon=True).start()


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of "host:port", where an IPv6 host may be in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def keep_alive(connection: socket.socket, seconds: int) -> None:
    """Makes the system close a connection whose other host has not answered for `seconds`.

    The other host's kernel answers, however busy the process there is.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 4
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"
    every = max(1, seconds // (probes + 1))
    wanted = {idle: every, "TCP_KEEPINTVL": every, "TCP_KEEPCNT": probes, "TCP_USER_TIMEOUT": seconds * 1000}
    for name, value in wanted.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _carry(near: socket.socket, service: tuple[str, int]) -> None:
    """Forwards bytes both ways until the near end is closed."""
    while True:
        try:
            far = socket.create_connection(service, timeout=10)
            break
        except OSError:
            time.sleep(_RETRY_SECONDS)
    far.settimeout(None)
    keep_alive(far, 60)
    threading.Thread(target=_pump, args=(far, near), daemon=True).start()
    _pump(near, far)
    far.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while received := source.recv(_CHUNK):
            sink.sendall(received)
