"""Interpreters that answer requests over a socket, and frames on it: bytes with their length before them."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

_SIZE = struct.Struct("!Q")


def start(
    program: str, flags: Sequence[str], arguments: Sequence[str], **options: Any
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A fresh interpreter, and this end of the socket that is its standard input.

    An interrupt from the terminal is the parent's affair, so the process has a session of its own.

    Args:
      program: Python code. `sys.path` of this process is its first argument, as JSON: PYTHONPATH would also reach
        programs, perhaps of another Python, that it starts.
      flags: of the interpreter.
      arguments: of the program, after the path.
      options: of `subprocess.Popen`.

    Raises OSError where it cannot be started.
    """
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    ours, theirs = socket.socketpair()
    command = [sys.executable, *flags, "-c", program, json.dumps(path), *arguments]
    try:
        with theirs:
            process = subprocess.Popen[bytes](command, stdin=theirs.fileno(), start_new_session=True, **options)
    except BaseException:
        ours.close()
        raise
    return process, ours


def send(channel: socket.socket, value: object) -> None:
    """Writes a pickled value; raises OSError when nobody reads."""
    send_bytes(channel, pickle.dumps(value))


def receive(channel: socket.socket) -> Any:
    """The value that was sent next; raises EOFError where nothing more comes, OSError where it stops half-way."""
    return pickle.loads(receive_bytes(channel))


def send_bytes(channel: socket.socket, data: bytes) -> None:
    """Writes one frame."""
    channel.sendall(_SIZE.pack(len(data)) + data)


def receive_bytes(channel: socket.socket, seconds: float | None = None) -> bytes:
    """The content of the next frame; raises TimeoutError where it has not come within `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    return _exactly(channel, _SIZE.unpack(_exactly(channel, _SIZE.size, deadline))[0], deadline)


def _exactly(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    data = bytearray()
    while len(data) < size:
        if deadline is not None:
            channel.settimeout(max(deadline - time.monotonic(), 1e-6))
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
