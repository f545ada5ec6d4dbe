"""Which of a cluster's routers to call: one of them, until it cannot be reached. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from headrace._errors import HeadraceError

_GONE = frozenset({"NO_CONNECTION", "SHUTTING_DOWN"})


class Routers:
    """The addresses of one cluster's routers, of which `current` is called. May be shared by threads."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = tuple(addresses)
        # Clients begin with different ones, so that each router has its part of them.
        self.current = random.randrange(len(self.addresses))

    def failed(self, index: int, error: HeadraceError) -> None:
        """A call to router `index` failed: the next one has its turn, where that one is gone."""
        if error.cause in _GONE and index == self.current:
            self.current = (index + 1) % len(self.addresses)
