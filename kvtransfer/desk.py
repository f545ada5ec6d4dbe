"""The lease table behind its lock, with whoever waits for it and whoever gets memory back.

Every change of leases in a worker goes through `LeaseDesk.change`, so that memory that has become
free is handed back, and a waiting commit looks again, however the change came about.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtransfer.leases import LeaseTable


class LeaseDesk:
    """`lock` is the engine's; `on_reclaim(lease_ids)` is called with it held, once for each lease."""

    def __init__(
        self, table: LeaseTable, lock: threading.RLock, on_reclaim: Callable[[list[bytes]], None]
    ) -> None:
        self._table = table
        self._changed = threading.Condition(lock)
        self._on_reclaim = on_reclaim

    @contextmanager
    def change(self) -> Iterator[LeaseTable]:
        """The table, under the lock."""
        with self._changed:
            version = self._table.version
            try:
                yield self._table
            finally:
                reclaimed = self._table.drain_reclaimable()
                if reclaimed:
                    self._on_reclaim(reclaimed)
                if self._table.version != version:
                    self._changed.notify_all()

    def wait_beyond(self, version: int, timeout_s: float) -> None:
        """Returns when the table has changed since `version`, or after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._table.version != version, timeout_s)

    def tick(self) -> list[bytes]:
        """Ends the leases whose time is up, and returns their ids. Call it some times a second."""
        with self.change() as table:
            return table.expire()
