"""Ends all processes of a program when one of them ends, with the same sentence.

Every process holds a connection to process 0. The operating system closes it when a process ends, however that happens,
and when a host is gone (TCP keep-alive: its kernel no longer answers; a process that is merely busy or stopped does not
count as lost). A process that ends in order first sends an exit code and the reason, which process 0 passes on.
A connection that closes without such a message is a loss:

    code 0    finished; all wait for each other, so that they end together
    code 2    refused: the others print the same sentence
    code 130  interrupted
    code 1    failed or lost; the sentence names process and host

A thread listens and ends the process by `os._exit`, since the main thread may be in a collective operation that will
never return. It needs Python's global lock, which JAX and the solver release while they work.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import NoReturn

from puzzle_jax.errors import ConfigError
from puzzle_jax.files import Json
from puzzle_jax.processes.relay import keep_alive

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""

_SILENCE_SECONDS = 20  # without an answer, after which a host counts as gone
_JOIN_SECONDS = 60  # until all processes have made their connections
_HELLO_SECONDS = 10  # for a connection to name its process
_PASS_ON_SECONDS = 2  # for the others to receive why process 0 ends, before its connections are closed
_GRACE_SECONDS = 30  # until a process that fails to end by itself is ended


@dataclass(frozen=True)
class Ending:
    """The exit code of a process, and the sentence that all processes print as the reason."""

    code: int
    sentence: str = ""


class Watchdog:
    """The connections of one process to the others; made by `lead` in process 0 and by `follow` in the others.

    `program` precedes every sentence.
    """

    def __init__(self, program: str, index: int, hosts: list[str], links: dict[int, _Link]) -> None:
        self.program, self.index, self.hosts = program, index, hosts
        self._links, self._finished = links, set[int]()
        self._changed = threading.Condition()  # its lock is never released if the listener ends the process
        self._leaving = False
        os.register_at_fork(after_in_child=self._close)  # a child that outlives us must not hide that we are gone
        for other in links:
            threading.Thread(target=self._listen, args=(other,), name=f"watchdog {other}", daemon=True).start()

    @staticmethod
    def lead(program: str, count: int, publish: Callable[[str], None]) -> Watchdog:
        """Waits in process 0 for the connections of all others; `publish` sends them the last argument of `follow`."""
        ipv6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        token, deadline = secrets.token_hex(16), time.monotonic() + _JOIN_SECONDS
        links: dict[int, _Link] = {}
        hosts = {0: socket.gethostname()}
        with socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6, backlog=count) as server:
            publish(json.dumps({"port": server.getsockname()[1], "token": token}))
            while len(links) < count - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    lost = next(index for index in range(1, count) if index not in links)
                    end_now(program, Ending(FAILED, f"process {lost} was lost while all were being brought together"))
                with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # somebody else's connection
                    link = _Link(connection)
                    hello = link.receive(_HELLO_SECONDS)
                    if secrets.compare_digest(hello["token"], token):
                        links[hello["index"]], hosts[hello["index"]] = link, hello["host"]
        names = [hosts[index] for index in range(count)]
        for link in links.values():
            link.send({"hosts": names})
        return Watchdog(program, 0, names, links)

    @staticmethod
    def follow(program: str, index: int, host: str, published: str) -> Watchdog:
        """Connects to process 0 on `host`, as its `lead` published. Raises ConfigError if it cannot be reached."""
        found = json.loads(published)
        try:
            link = _Link(socket.create_connection((host, found["port"]), timeout=_JOIN_SECONDS))
            link.send({"index": index, "host": socket.gethostname(), "token": found["token"]})
            hosts = link.receive(_JOIN_SECONDS + 10)["hosts"]
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"process {index} (host {socket.gethostname()}) cannot reach process 0 at {host}:{found['port']} "
                f"({error}); processes need TCP connections of any port between their hosts"
            ) from error
        return Watchdog(program, index, hosts, {0: link})

    def name(self, index: int) -> str:
        """The name of a process in sentences."""
        return f"process {index} (host {self.hosts[index]})"

    def finish(self) -> None:
        """Waits until all processes have finished; later losses are ignored."""
        with self._changed:
            if self.index:
                self._send(Ending(FINISHED))
            self._changed.wait_for(lambda: len(self._finished) == len(self._links))
            self._leaving = True
            if self.index == 0:
                self._send(Ending(FINISHED))

    def leave(self, ending: Ending, verdict_seconds: float = 0.0) -> None:
        """Sends the others the exit code and reason with which this process is about to end.

        If another process is lost within `verdict_seconds`, which may be why this one ends, that loss takes precedence
        and ends this process during the call.
        """
        time.sleep(verdict_seconds)
        with self._changed:
            self._leaving = True
        self._pass_on(ending)
        ends = threading.Timer(_GRACE_SECONDS, os._exit, [ending.code])
        ends.daemon = True
        ends.start()

    def _listen(self, other: int) -> None:
        link = self._links[other]
        with suppress(OSError, ValueError, TypeError):
            while True:
                self._receive(other, Ending(**link.receive()))
        link.closed.set()
        if self._leaving:
            return
        with self._changed:
            if not self._leaving and other not in self._finished:
                sentence = (
                    f"{self.name(other)} was lost: it was killed, it crashed, or its host is gone; start all "
                    "processes again, and the same command goes on from what is finished"
                )
                self._end(Ending(FAILED, sentence), other)

    def _receive(self, other: int, ending: Ending) -> None:
        with self._changed:
            if self._leaving:
                return
            if ending.code != FINISHED:
                self._end(ending, other)
            self._finished.add(other)
            self._changed.notify_all()

    def _end(self, ending: Ending, came_from: int) -> None:
        """Ends this process."""
        self._pass_on(ending, but=came_from)
        end_now(self.program, ending)

    def _pass_on(self, ending: Ending, but: int | None = None) -> None:
        """Sends an ending over all connections; process 0 then waits for the others to receive it."""
        self._send(ending, but)
        if self.index == 0:
            deadline = time.monotonic() + _PASS_ON_SECONDS
            for other, link in self._links.items():
                if other != but:
                    link.closed.wait(max(deadline - time.monotonic(), 0.0))

    def _send(self, ending: Ending, but: int | None = None) -> None:
        for other, link in self._links.items():
            if other != but:
                with suppress(OSError):
                    link.send(asdict(ending))

    def _close(self) -> None:
        for link in self._links.values():
            link.connection.close()


class _Link:
    """A connection that carries JSON objects, one per line."""

    def __init__(self, connection: socket.socket) -> None:
        keep_alive(connection, _SILENCE_SECONDS)
        connection.settimeout(None)
        self.connection, self.closed = connection, threading.Event()
        self._received = b""

    def send(self, value: dict[str, Json]) -> None:
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> dict[str, Json]:
        """The next object. Raises OSError if the connection ends or nothing arrives in time."""
        self.connection.settimeout(timeout)
        while b"\n" not in self._received:
            received = self.connection.recv(1 << 12)
            if not received:
                raise ConnectionError("the connection was closed")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        self.connection.settimeout(None)
        return json.loads(line)


def end_now(program: str, ending: Ending) -> NoReturn:
    """Prints the sentence and ends the process, from any thread and whatever other threads do."""
    # The main thread may hold the locks of these files for ever.
    flushed = threading.Thread(target=_flush, daemon=True)
    flushed.start()
    flushed.join(1)
    shown = "\x1b[?25h\n" if os.isatty(2) else ""  # a progress bar hides the cursor
    os.write(2, f"{shown}{program}: {ending.sentence}\n".encode())
    os._exit(ending.code)


def _flush() -> None:
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            file.flush()
