"""Tickets with which a client streams an answer from the worker that writes it: made by routers, read by workers.

Sealed with a key derived from the cluster secret (HMAC-SHA256). A ticket names one attempt on one incarnation of a
worker, holds no text, is late some seconds after it was made and is taken once. It is the one place where wall clocks
of two machines are compared: where they differ by more than the time a ticket lasts, tickets are refused and the router
relays. Opaque to clients; the layout may change with the leading version byte. Knows no gRPC and no clock.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

from kvtransfer import sealing

TICKET_TTL_S = 30.0
TICKET_ID_BYTES = 16
MAX_TAKEN = 1 << 16
"""Tickets remembered as taken; a worker that has taken so many within `TICKET_TTL_S` takes no more for a while."""
_VERSION = b"\x01"
_PURPOSE = b"direct-ticket"


class BadTicket(ValueError):
    """Nobody gets in with it; the message says why, `cause` in one word."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectTicket:
    """Which attempt of whose request, on which incarnation of a worker. `ticket_id`: random, in hex. `expires_s`: by
    the wall clock, seconds since 1970."""

    tenant: str
    request_id: str
    attempt: int
    epoch: int
    ticket_id: str
    expires_s: float


def seal(ticket: DirectTicket, cluster_secret: bytes) -> bytes:
    """The ticket as a client gets it."""
    return sealing.seal(_VERSION + json.dumps(asdict(ticket)).encode(), _PURPOSE, cluster_secret)


def unseal(sealed: bytes, cluster_secret: bytes) -> DirectTicket:
    """The ticket that a client brought.

    Raises:
        BadTicket: it was not made with this secret, or by another version.
    """
    try:
        content = sealing.unseal(sealed, _PURPOSE, cluster_secret)
    except sealing.BrokenSeal:
        raise BadTicket("BAD_TICKET", "the ticket was not made by this cluster") from None
    if content[:1] != _VERSION:
        raise BadTicket("BAD_TICKET", "the ticket is of another version")
    return DirectTicket(**json.loads(content[1:]))


class TicketDesk:
    """Takes tickets, each once. Remembers those taken until they would be late anyway."""

    def __init__(
        self, cluster_secret: bytes, wall_clock: Callable[[], float], max_taken: int = MAX_TAKEN
    ) -> None:
        self._cluster_secret = cluster_secret
        self._wall_clock = wall_clock
        self._max_taken = max_taken
        self._taken: OrderedDict[str, float] = OrderedDict()  # by when they were taken

    def take(self, sealed: bytes, epoch: int) -> DirectTicket:
        """The ticket, for the incarnation `epoch`.

        Raises:
            BadTicket: it is none of this cluster or incarnation, is late, lasts longer than any ticket does, or was
                taken before.
        """
        ticket, now = unseal(sealed, self._cluster_secret), self._wall_clock()
        self._forget(now)
        if ticket.epoch != epoch:
            raise BadTicket("OTHER_EPOCH", "the ticket is for another incarnation of this worker")
        if not now < ticket.expires_s <= now + 2 * TICKET_TTL_S:
            raise BadTicket("TICKET_LATE", f"the ticket was to be used within {TICKET_TTL_S:g} s")
        if ticket.ticket_id in self._taken:
            raise BadTicket("TICKET_USED", "the ticket was used before")
        if len(self._taken) >= self._max_taken:
            raise BadTicket("TOO_MANY_TICKETS", f"{self._max_taken} tickets were used within the last moment")
        self._taken[ticket.ticket_id] = now + 2 * TICKET_TTL_S  # by then it is late, whatever it says
        return ticket

    def _forget(self, now: float) -> None:
        while self._taken and next(iter(self._taken.values())) <= now:
            self._taken.popitem(last=False)
