"""Rendering of chat templates in a process of its own, which bounds what a template can take.

A chat template is a program that comes with a checkpoint. Jinja's sandbox keeps it from files and from Python's
internals, but not from loops without end or texts without bound, within a single operation too: only another process
can be given so much processor time and memory and no more. One such process (`render_worker`) serves the whole program.
It starts with the first rendering, in a tenth of a second, and ends with the program; a rendering then takes about as
long as in the same process. A template that uses up its time or memory, or brings the process down, is refused in one
sentence, and the next rendering starts a new process.
Left out: a limit on memory where the operating system has none (RLIMIT_AS).
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from puzzle_jax.errors import CheckpointError
from puzzle_jax.tasks.chat import render_worker

RENDER_SECONDS = 5.0
"""Processor time that one rendering may take."""

RENDER_BYTES = 1 << 30
"""Address space of the process that renders."""

LONGEST_TEXT = 1 << 22
"""Bytes of UTF-8 that a template may render: more than any context holds, and what a tokenizer of characters still
encodes in 2 GB."""

# On a machine where everything waits, processor time may come late; but not by this much.
_WAIT_SECONDS = 120.0
# sys.path is given as text: the process must find the same jinja2, and nothing else depends on its environment.
_PROGRAM = (
    "import runpy, sys, json; sys.path[:] = json.loads(sys.argv.pop()); runpy.run_path({!r}, run_name='__main__')"
)


@dataclass(frozen=True)
class Template:
    """A checkpoint's chat template.

    Attributes:
      source: its Jinja text.
      where: the file that it stands in, for messages.
      today: what `strftime_now` says.
      tokens: special tokens by the names that templates know them by (`bos_token`).
    """

    source: str
    where: str
    today: datetime.datetime
    tokens: Mapping[str, str] = field(default_factory=dict, hash=False)

    def render(self, **variables: Any) -> str:
        """The text for these variables, which must be what JSON can say; they go before tokens of the same name.

        Raises:
          CheckpointError: the template is no valid Jinja, raises any error, refuses the conversation, writes text that
            is not Unicode, or takes more time, memory or text than a rendering may.
        """
        kind, text = _SERVICE.ask(self._key, self.source, self.today.isoformat(), {**self.tokens, **variables})
        if kind != render_worker.DONE:
            raise CheckpointError(f"the chat template {self.where} {text}")
        return text

    @cached_property
    def _key(self) -> str:
        return hashlib.sha256(f"{self.today.isoformat()} {self.source}".encode(errors="surrogatepass")).hexdigest()


class _Service:
    """The process that renders, and what it knows. Threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._known: set[str] = set()
        self._owner = 0

    def ask(self, key: str, source: str, today: str, variables: Mapping[str, Any]) -> tuple[bytes, str]:
        """Kind of answer, and the text or why there is none."""
        with self._lock:
            if self._owner != os.getpid():  # A fork has its parent's process, which is not its own to use.
                self._process = self._channel = None
            for attempt in (1, 2):
                fresh = self._process is None
                if fresh:
                    self._start()
                request: dict[str, Any] = {"key": key, "variables": variables}
                if key not in self._known:
                    request |= {"source": source, "today": today}
                try:
                    kind, text = self._exchange(json.dumps(request).encode())
                except TimeoutError:
                    self._end()
                    return render_worker.REFUSED, f"cannot be rendered: no answer came in {_WAIT_SECONDS:g} s"
                except (OSError, EOFError):
                    reason = self._end()
                    # An idle process may have been ended by anybody, which is not this template's fault.
                    if fresh or attempt == 2 or reason.by_time:
                        return render_worker.REFUSED, reason.text
                except BaseException:  # An interrupt: the answer that is still to come must not be taken for the next.
                    self._end()
                    raise
                else:
                    if kind == render_worker.DONE:
                        self._known.add(key)
                    elif kind == render_worker.BROKEN:
                        self._end()
                    return kind, text
            raise AssertionError("the second attempt returns")

    def close(self) -> None:
        """Ends the process, if it is this program's own."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._end()

    def _exchange(self, request: bytes) -> tuple[bytes, str]:
        channel = self._channel
        assert channel is not None
        deadline = time.monotonic() + _WAIT_SECONDS
        channel.settimeout(_WAIT_SECONDS)
        channel.sendall(render_worker.SIZE.pack(len(request)) + request)
        (size,) = render_worker.SIZE.unpack(_exactly(channel, render_worker.SIZE.size, deadline))
        answer = _exactly(channel, size, deadline)
        return answer[:1], answer[1:].decode()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
        settings = [str(os.getpid()), str(RENDER_SECONDS), str(RENDER_BYTES), str(LONGEST_TEXT), json.dumps(path)]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    # -I and -S: neither the working directory nor site packages' hooks have a say; the path is given.
                    [sys.executable, "-I", "-S", "-c", _PROGRAM.format(str(Path(render_worker.__file__))), *settings],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,  # An interrupt from the terminal is the parent's affair.
                )
            except OSError as error:
                ours.close()
                raise CheckpointError(
                    f"the process that renders chat templates cannot be started: {error.strerror or error}"
                ) from None
        self._channel, self._known, self._owner = ours, set(), os.getpid()

    def _end(self) -> _End:
        process, channel = self._process, self._channel
        self._process = self._channel = None
        assert process is not None and channel is not None
        channel.close()
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(1.0)  # It ends by itself where the channel is closed.
        if code is None:
            process.kill()
            code = process.wait()
        if code == -signal.SIGPROF:
            return _End(f"cannot be rendered: it takes more than {RENDER_SECONDS:g} s of processor time", True)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return _End(f"cannot be rendered: the process that renders it ended with {how}", False)


@dataclass(frozen=True)
class _End:
    """How the process ended."""

    text: str
    by_time: bool


def _exactly(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(left)
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


_SERVICE = _Service()
atexit.register(_SERVICE.close)
