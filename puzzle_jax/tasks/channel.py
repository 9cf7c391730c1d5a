"""Interpreters that answer requests over a socket, in frames: bytes preceded by their length."""

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
    """Starts a fresh interpreter; returns it and this end of the socket that is its standard input.

    The process has a session of its own, so that an interrupt from the terminal reaches the parent only.

    Args:
      program: Python code. Its first argument is `sys.path` of this process, as JSON: PYTHONPATH would also affect the
        programs that it starts, perhaps with another Python.
      flags: command-line flags of the interpreter.
      arguments: arguments of the program, after the path.
      options: options of `subprocess.Popen`.

    Raises OSError if it cannot be started.
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
    """Sends a pickled value; raises OSError if the other end is closed."""
    send_bytes(channel, pickle.dumps(value))


def receive(channel: socket.socket) -> Any:
    """Receives the next value; raises EOFError if the other end is closed, OSError if the connection fails."""
    return pickle.loads(receive_bytes(channel))


def send_bytes(channel: socket.socket, data: bytes) -> None:
    """Sends one frame."""
    channel.sendall(_SIZE.pack(len(data)) + data)


def receive_bytes(channel: socket.socket, seconds: float | None = None) -> bytes:
    """The content of the next frame; raises TimeoutError if it has not arrived within `seconds`."""
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
