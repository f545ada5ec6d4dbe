"""A bare gRPC stream: raw messages through generic handlers, one acknowledgement each, nothing behind either end.

What gRPC for Python takes by itself: no transfer over it can be faster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc

_SERVICE, _METHOD = "headrace.bench", "Take"
_IN_FLIGHT = 16
_ACK = b"taken"


def handler() -> grpc.GenericRpcHandler:
    """Takes messages and drops them."""

    def take(messages: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in messages:
            yield _ACK

    methods = {_METHOD: grpc.stream_stream_rpc_method_handler(take)}
    return grpc.method_handlers_generic_handler(_SERVICE, methods)


def send(channel: grpc.Channel, message: bytes, num_messages: int, timeout_s: float) -> float:
    """Seconds from the first message to the last acknowledgement. Raises grpc.RpcError."""
    room = threading.Semaphore(_IN_FLIGHT)

    def messages() -> Iterator[bytes]:
        for _ in range(num_messages):
            room.acquire()
            yield message

    began = time.monotonic()
    call: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")
    for _ in call(messages(), timeout=timeout_s):
        room.release()
    return time.monotonic() - began
