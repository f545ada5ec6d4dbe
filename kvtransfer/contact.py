"""When a sender last heard of its receiver, and what follows from it: renew the lease, or give up. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

RENEWALS_PER_TTL = 3
RETRIES_PER_TTL = 10


class Contact:
    """One lease's sign of life, as its sender sees it. `ttl_s`: as the receiver granted it."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self.touch()

    def touch(self) -> None:
        """A frame was begun, or the receiver answered: the lease's TTL starts anew about now."""
        self._touched_at = self._clock()
        self.renew_at = self._touched_at + self._ttl_s / RENEWALS_PER_TTL

    def retry_renewal(self) -> None:
        """A renewal did not arrive: try again soon."""
        self.renew_at = self._clock() + self._ttl_s / RETRIES_PER_TTL

    @property
    def lost_at(self) -> float:
        """From then on the lease has expired over there, unless something arrived unseen."""
        return self._touched_at + self._ttl_s

    @property
    def is_lost(self) -> bool:
        return self._clock() >= self.lost_at

    @property
    def renewal_timeout_s(self) -> float:
        return self._ttl_s / RENEWALS_PER_TTL
