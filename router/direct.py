"""Direct streams as the router sees them: the tickets that it hands out, and who streams past it now.

The router stays the owner of an answer. A client that streams from the worker is sent no tokens here meanwhile; its
attachment keeps its place, and goes on from there when the stream breaks or the answer is written elsewhere.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from headrace.v1 import inference_pb2 as pb
from kvtransfer.direct_ticket import TICKET_ID_BYTES, TICKET_TTL_S, DirectTicket, seal
from router.core.fleet import WorkerRef


@dataclass(frozen=True, slots=True)
class DirectSource:
    """Where an attempt's tokens can be had."""

    tenant: str
    request_id: str
    attempt: int
    epoch: int
    address: str
    cluster_secret: bytes
    wall_clock: Callable[[], float]

    def ticket(self) -> tuple[str, pb.GenerateResponse]:
        """A new ticket's id, and the message that brings it."""
        ticket_id = secrets.token_hex(TICKET_ID_BYTES)
        ticket = DirectTicket(
            tenant=self.tenant,
            request_id=self.request_id,
            attempt=self.attempt,
            epoch=self.epoch,
            ticket_id=ticket_id,
            expires_s=self.wall_clock() + TICKET_TTL_S,
        )
        token = seal(ticket, self.cluster_secret)
        message = pb.Ticket(address=self.address, token=token, ttl_s=TICKET_TTL_S)
        return ticket_id, pb.GenerateResponse(ticket=message)


class DirectSources:
    """Knows which workers serve clients directly, by incarnation."""

    def __init__(self, cluster_secret: bytes, wall_clock: Callable[[], float]) -> None:
        self._cluster_secret = cluster_secret
        self._wall_clock = wall_clock
        self._addresses: dict[WorkerRef, str] = {}

    def joined(self, ref: WorkerRef, address: str) -> None:
        """`address`: empty for a worker that does not."""
        if address:
            self._addresses[ref] = address

    def left(self, ref: WorkerRef) -> None:
        """The incarnation is gone."""
        self._addresses.pop(ref, None)

    def of(self, ref: WorkerRef, tenant: str, request_id: str, attempt: int) -> DirectSource | None:
        """Where clients may read that attempt; None where that worker does not serve them."""
        address = self._addresses.get(ref)
        if address is None:
            return None
        return DirectSource(
            tenant, request_id, attempt, ref.epoch, address, self._cluster_secret, self._wall_clock
        )
