"""The port that clients stream answers from: rpc's server with Direct alone, on the service loop.

Who may come in is decided here, by the ticket; what a stream is sent is the decode service's, which says so through
`on_redeemed`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeAlias

import grpc

from headrace.v1 import inference_pb2, inference_pb2_grpc
from kvtransfer.direct_ticket import BadTicket, DirectTicket, TicketDesk
from rpc.call import ServerCall
from rpc.details import failed
from rpc.heads import Status
from rpc.server import Server, ServerSettings
from worker.servers import join_address

logger = logging.getLogger(__name__)

MAX_STREAMS = 4096
MAX_REQUEST_BYTES = 16 << 10
KEEPALIVE_S = 10.0


class DirectRefused(Exception):
    """A stream that cannot be: the ticket was good, what it asks for is not here."""

    def __init__(self, code: grpc.StatusCode, cause: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.cause = cause


OnRedeemed: TypeAlias = Callable[[DirectTicket, Sequence[int], ServerCall], None]


class DirectServer(inference_pb2_grpc.DirectServicer):
    """Made, started and stopped on the service loop. `on_redeemed`: gives a stream its tokens from now on; raises
    DirectRefused."""

    def __init__(self, host: str, port: int, desk: TicketDesk, current_epoch: Callable[[], int]) -> None:
        """Raises RuntimeError where the port cannot be bound."""
        self.on_redeemed: OnRedeemed = _nobody_decodes
        self._desk = desk
        self._current_epoch = current_epoch
        settings = ServerSettings(
            max_message_bytes=MAX_REQUEST_BYTES, max_calls=MAX_STREAMS, keepalive_s=KEEPALIVE_S
        )
        self._server = Server(settings)
        inference_pb2_grpc.add_DirectServicer_to_server(self, self._server)  # type: ignore[arg-type]
        self.address = join_address(host, self._server.add_insecure_port(join_address(host, port)))

    async def start(self) -> None:
        """Begin to accept."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuse new streams, and cut those that go on after the grace."""
        await self._server.stop(grace_s)

    def Stream(  # type: ignore[override] # pushes
        self, request: inference_pb2.DirectRequest, call: ServerCall
    ) -> None:
        """One client's stream of one attempt's tokens."""
        try:
            ticket = self._desk.take(request.ticket, self._current_epoch())
            self.on_redeemed(ticket, request.next_index, call)
        except BadTicket as bad:
            call.end(_status(grpc.StatusCode.UNAUTHENTICATED, bad.cause, str(bad)))
        except DirectRefused as refused:
            call.end(_status(refused.code, refused.cause, str(refused)))


def broken(cause: str, message: str) -> Status:
    """How a stream ends that the worker gives up; the router goes on."""
    return _status(grpc.StatusCode.ABORTED, cause, message)


def _status(code: grpc.StatusCode, cause: str, message: str) -> Status:
    return failed(code, inference_pb2.ErrorDetail(stage="decode", cause=cause, message=message))


def _nobody_decodes(_ticket: DirectTicket, _next_index: Sequence[int], _call: ServerCall) -> None:
    raise DirectRefused(grpc.StatusCode.NOT_FOUND, "WRONG_ROLE", "this worker does not decode")
