"""How fast KV may land while answers are being written.

Landing a frame takes the interpreter and memory bandwidth from the step that runs beside it. While the
engine decodes, frames are let in at a bounded rate, so that a burst at the end of a chunk is spread over
steps instead of stalling one; while it does not, they land as fast as they come.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BYTES_PER_S_WHILE_DECODING = 384 << 20


class LandingPace:
    """A callable for `FrameLander`: returns when `num_bytes` may be written. Safe to call from many threads."""

    def __init__(
        self,
        is_decoding: Callable[[], bool],
        bytes_per_s: float = BYTES_PER_S_WHILE_DECODING,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._is_decoding = is_decoding
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __call__(self, num_bytes: int) -> None:
        """Wait for this frame's turn."""
        if not self._is_decoding():
            return
        with self._lock:
            now = self._clock()
            start = max(now, self._free_at)
            self._free_at = start + num_bytes / self._bytes_per_s
        if start > now:
            self._sleep(start - now)
