"""What waits to be written to disk: a queue bounded in bytes, and the one thread that empties it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.tiers.records import BlockRecord
    from kvtransfer.tiers.segments import DiskTier

_log = logging.getLogger(__name__)

IDLE_S = 0.5


class WriteBack:
    """`limit_bytes`: payload bytes that may wait, those being written included. `lock`: the store's. The thread
    also opens the tier, and tries again while it is off."""

    def __init__(self, disk: DiskTier, limit_bytes: int, lock: threading.RLock) -> None:
        self._disk = disk
        self._limit_bytes = limit_bytes
        self._changed = threading.Condition(lock)
        self._queue: deque[Sequence[BlockRecord]] = deque()
        self._is_writing = False
        self._is_closed = False
        self._was_opened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-store-write", daemon=True)
        self.queued_bytes = 0
        self.num_dropped = 0
        self.dropped_bytes = 0
        self.progress = (0, 0)  # segments read while the tier is being opened, of how many

    def start(self) -> None:
        """The thread begins by opening the tier."""
        self._thread.start()

    def wait_opened(self, timeout_s: float) -> bool:
        """Whether the first attempt to open the tier is over, however it ended."""
        return self._was_opened.wait(timeout_s)

    def put(self, records: Sequence[BlockRecord]) -> bool:
        """Queues records of one tenant, all or none; whether they are queued. Never waits."""
        num_bytes = sum(record.payload_bytes for record in records)
        with self._changed:
            if self._is_closed or self.queued_bytes + num_bytes > self._limit_bytes:
                self.num_dropped += len(records)
                self.dropped_bytes += num_bytes
                return False
            self._queue.append(records)
            self.queued_bytes += num_bytes
            self._changed.notify_all()
        return True

    def drain(self, timeout_s: float) -> bool:
        """Whether all that was queued has been written or given up within `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._is_writing, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Takes nothing more, and writes what waits for up to `timeout_s`. Whether the thread has ended: one that
        hangs in a disk that does not answer is left behind."""
        self.drain(timeout_s)
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            self._changed.notify_all()
        with suppress(RuntimeError):  # it was never started
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            if self._disk.is_due:
                self._open()
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed, IDLE_S)
                if self._is_closed:
                    return
                if not self._queue:
                    continue
                records = self._queue.popleft()
                self._is_writing = True
            self._write(records)

    def _open(self) -> None:
        try:
            self._disk.open(self._note_progress)
        except Exception:  # noqa: BLE001 - the thread must outlive whatever a directory holds
            _log.exception("opening the disk tier failed")
        self._was_opened.set()

    def _note_progress(self, done: int, of: int) -> None:
        self.progress = (done, of)

    def _write(self, records: Sequence[BlockRecord]) -> None:
        try:
            self._disk.write(records)
        except Exception:  # noqa: BLE001 - one batch pays for it
            _log.exception("writing %d blocks to disk failed", len(records))
        with self._changed:
            self.queued_bytes -= sum(record.payload_bytes for record in records)
            self._is_writing = False
            self._changed.notify_all()
