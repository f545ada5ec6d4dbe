"""What a bare TCP socket moves: the measure that transports are held against."""

from __future__ import annotations

import socket
import time

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 120.0
_DONE = b"k"


def listen(host: str, congestion: str) -> socket.socket:
    """A listening socket on any port. `congestion`: the kernel's name of an algorithm; empty is its default."""
    server = socket.create_server((host, 0))
    server.settimeout(TIMEOUT_S)
    _set_congestion(server, congestion)
    return server


def receive(server: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer` from one connection, then say so."""
    connection, _ = server.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        filled = 0
        while filled < len(buffer):
            got = connection.recv_into(buffer[filled : filled + CHUNK_BYTES])
            if not got:
                raise ConnectionError(f"the sender ended after {filled} bytes of {len(buffer)}")
            filled += got
        connection.sendall(_DONE)


def send(host: str, port: int, congestion: str, data: memoryview) -> float:
    """Seconds from the first byte to the receiver's word that it has all of it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
        _set_congestion(connection, congestion)
        connection.settimeout(TIMEOUT_S)
        connection.connect((host, port))
        began = time.monotonic()
        for start in range(0, len(data), CHUNK_BYTES):
            connection.sendall(data[start : start + CHUNK_BYTES])
        if connection.recv(1) != _DONE:
            raise ConnectionError("the receiver ended without a word")
        return time.monotonic() - began


def default_congestion() -> str:
    """The kernel's default algorithm."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        name = probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode()


def _set_congestion(connection: socket.socket, congestion: str) -> None:
    if congestion:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
