"""One stream of a connection: its windows, what waits to be sent, and what came of a message that is not whole."""

from __future__ import annotations

from collections import deque
from typing import Any

from rpc.messages import MessageReader


class Stream:
    """`owner` is whoever made it, for the connection's observer. Windows in bytes; `send_window` may be negative after
    the peer made it smaller. `pending`: (bytes, whether the stream ends with them, whether they are headers)."""

    __slots__ = (
        "id",
        "is_local_done",
        "is_paused",
        "is_remote_done",
        "owner",
        "pending",
        "reader",
        "receive_window",
        "send_window",
        "uncredited",
    )

    def __init__(self, stream_id: int, send_window: int, receive_window: int, max_message_bytes: int) -> None:
        self.id = stream_id
        self.send_window = send_window
        self.receive_window = receive_window
        self.uncredited = 0
        self.is_paused = False
        self.is_local_done = False
        self.is_remote_done = False
        self.pending: deque[tuple[bytes, bool, bool]] = deque()
        self.reader = MessageReader(max_message_bytes)
        self.owner: Any = None

    def wait_with(self, data: bytes, ends: bool, is_headers: bool) -> None:
        """Keeps what cannot be sent yet."""
        self.pending.append((data, ends, is_headers))
