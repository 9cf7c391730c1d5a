"""Values between two processes over a socket: pickled, with their length before them."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_SIZE = struct.Struct("!Q")


def send(channel: socket.socket, value: Any) -> None:
    """Writes a value with its length before it; raises OSError when nobody reads."""
    data = pickle.dumps(value)
    channel.sendall(_SIZE.pack(len(data)) + data)


def receive(channel: socket.socket) -> Any:
    """The value that was sent next; raises EOFError where nothing more comes, OSError where it stops half-way."""
    return pickle.loads(receive_bytes(channel))


def receive_bytes(channel: socket.socket) -> bytes:
    """What `receive` unpickles."""
    return _exactly(channel, _SIZE.unpack(_exactly(channel, _SIZE.size))[0])


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(min(size - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)
