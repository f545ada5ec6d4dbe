"""How fast prefill workers reach decode workers, as they measured it.

A worker measures the way to an address; all that were measured towards one address lie together, by the slot of
the one that measured. Only addresses of workers that are there are kept, and a worker's measurements go with it, so
the table is at most (decode workers) x (slots).
"""

from collections.abc import Mapping

import numpy as np

from router.core.columns import Floats
from router.core.fleet import LinkSpeed

NOT_MEASURED = -1.0


class LinkTable:
    """Seconds a byte and fixed seconds, by (slot of the pusher, address pushed to)."""

    def __init__(self) -> None:
        self._ways: dict[str, Floats] = {}  # rows: seconds a byte; fixed seconds; NOT_MEASURED both or none
        self._num_users: dict[str, int] = {}

    def open(self, address: str) -> None:
        """A worker is reached at this address. One address may be named by several."""
        self._num_users[address] = self._num_users.get(address, 0) + 1

    def close(self, address: str) -> None:
        """A worker that was reached there left."""
        self._num_users[address] -= 1
        if not self._num_users[address]:
            del self._num_users[address]
            self._ways.pop(address, None)

    def measured(self, slot: int, links: Mapping[str, LinkSpeed]) -> None:
        """Takes what the worker in this slot says of its links; what it does not name stays as it was."""
        for address, link in links.items():
            if address and address in self._num_users and link.is_possible:
                way = self._way(address, slot + 1)
                way[0, slot] = 1.0 / link.bytes_per_s
                way[1, slot] = link.fixed_s

    def forget(self, slot: int) -> None:
        """The worker in this slot left."""
        for way in self._ways.values():
            if slot < way.shape[1]:
                way[:, slot] = NOT_MEASURED

    def into(self, address: str, num_slots: int) -> Floats | None:
        """[2, at least num_slots]: seconds a byte from each slot, and fixed seconds, both below 0 where not measured;
        None if nobody measured the way there."""
        return self._way(address, num_slots) if address in self._ways else None

    def _way(self, address: str, num_slots: int) -> Floats:
        way = self._ways.get(address)
        if way is None or way.shape[1] < num_slots:
            wider = np.full((2, num_slots), NOT_MEASURED)
            if way is not None:
                wider[:, : way.shape[1]] = way
            self._ways[address] = way = wider
        return way
