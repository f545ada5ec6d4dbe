"""How many bytes each sender may have in flight, so that all of them together stay within one budget.

Half of the budget is kept so that every stream, however many come, may always have one frame in flight; as many
streams as that half carries are let in, one more is refused. The other half is lent out as more than one frame:
equal shares in the long run, but at once only half of what is free, so that a stream that comes later finds
something, too. What was told to a stream counts as lent until the next acknowledgement tells it less: a sender
may use it at any moment. So the sum of all that was told never exceeds the budget.
"""

from __future__ import annotations

import threading

DEFAULT_LANDING_BYTES = 64 << 20


class CreditBook:
    """The budget of one receiver. Safe to call from several threads.

    `budget_bytes`: of messages received and not yet acknowledged, all streams together. `frame_bytes`: the longest
    message of a well-behaved sender; the budget must hold two. Raises ValueError where it does not.
    """

    def __init__(self, budget_bytes: int, frame_bytes: int) -> None:
        if budget_bytes < 2 * frame_bytes:
            text = (
                f"{budget_bytes} bytes for landing are too few: frames have up to {frame_bytes}, two must fit"
            )
            raise ValueError(text)
        self.frame_bytes = frame_bytes
        self.max_streams = budget_bytes // 2 // frame_bytes
        self._to_lend = budget_bytes - self.max_streams * frame_bytes
        self._free = self._to_lend
        self._lent: dict[int, int] = {}  # by stream: beyond its one frame
        self._next_stream = 0
        self._lock = threading.Lock()

    @property
    def num_streams(self) -> int:
        with self._lock:
            return len(self._lent)

    def open(self) -> int | None:
        """A name for a new stream, or None when there are as many as the budget carries. `close` must follow."""
        with self._lock:
            if len(self._lent) >= self.max_streams:
                return None
            self._next_stream += 1
            self._lent[self._next_stream] = 0
            return self._next_stream

    def credit(self, stream: int) -> int:
        """What to tell the stream now: bytes that it may have in flight, at least one frame."""
        with self._lock:
            share = self._to_lend // len(self._lent)
            lent = self._lent[stream]
            now = min(share, lent + self._free // 2)
            self._free += lent - now
            self._lent[stream] = now
            return self.frame_bytes + now

    def close(self, stream: int) -> None:
        """The stream is over and nothing of it is held any more."""
        with self._lock:
            self._free += self._lent.pop(stream)
