"""Messages of one stream that came and were not taken yet: beyond a bound the peer's window closes."""

from __future__ import annotations

from collections import deque
from typing import Any

from rpc.connection import Connection
from rpc.stream import Stream


class Inbox:
    """Of one stream."""

    def __init__(self, max_bytes: float) -> None:
        """`max_bytes`: what may wait; the peer may go on once half of it has been taken."""
        self._max_bytes = max_bytes
        self._messages: deque[bytes] = deque()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, messages: list[bytes], connection: Connection[Any], stream: Stream) -> None:
        """Messages came on the stream."""
        self._messages.extend(messages)
        self._num_bytes += sum(map(len, messages))
        if self._num_bytes > self._max_bytes:
            connection.pause(stream)

    def take(self, connection: Connection[Any], stream: Stream) -> bytes:
        """The first of them. Raises IndexError where there is none."""
        message = self._messages.popleft()
        self._num_bytes -= len(message)
        if stream.is_paused and self._num_bytes <= self._max_bytes // 2:
            connection.resume(stream)
        return message
