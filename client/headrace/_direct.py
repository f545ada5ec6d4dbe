"""Streams from workers, opened with a router's tickets and given up without a word; read by the asyncio client beside
the router's (for the other client: `_direct_blocking`).

A direct stream is an offer. Whatever goes wrong with one (the worker cannot be reached from here, it died, this client
was too slow) the router's stream goes on where it stood; so nothing here raises.
"""

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import grpc

from headrace._connection import CHANNEL_OPTIONS
from headrace.v1 import inference_pb2 as wire
from headrace.v1.inference_pb2_grpc import DirectStub

MAX_CHANNELS = 64
LATE_S = 2.0
"""What the router says last, the worker said before; it may be so long behind."""
FAILED_S = 30.0
"""An address that could not be reached is left alone for so long."""


class DirectChannels:
    """Connections to workers, by address; those used last are kept. For both clients: `make` opens one to an address,
    `drop` closes it. Threads may share it."""

    def __init__(self, make: Callable[[str], Any], drop: Callable[[Any], None]) -> None:
        self._make = make
        self._drop = drop
        self._lock = threading.Lock()
        self._channels: OrderedDict[str, Any] = OrderedDict()
        self._failed_s: dict[str, float] = {}

    def open(self, ticket: wire.Ticket, next_index: list[int], timeout_s: float | None) -> Any:
        """A stream of an answer from `next_index` on; None where its worker could not be reached lately."""
        if time.monotonic() - self._failed_s.get(ticket.address, -FAILED_S) < FAILED_S:
            return None
        request = wire.DirectRequest(ticket=ticket.token, next_index=next_index)
        return DirectStub(self._channel(ticket.address)).Stream(request, timeout=timeout_s)

    def failed(self, address: str, error: BaseException | None) -> None:
        """How a stream from there ended; where nobody answered, that is remembered."""
        if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.UNAVAILABLE:
            if len(self._failed_s) >= MAX_CHANNELS:
                self._failed_s.clear()
            self._failed_s[address] = time.monotonic()

    def close(self) -> None:
        """End every stream."""
        with self._lock:
            while self._channels:
                self._drop(self._channels.popitem()[1])

    def _channel(self, address: str) -> Any:
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                channel = self._channels[address] = self._make(address)
            self._channels.move_to_end(address)
            if len(self._channels) > MAX_CHANNELS:
                self._drop(self._channels.popitem(last=False)[1])
            return channel


class AsyncDirectChannels(DirectChannels):
    """Those of an event loop."""

    def __init__(self) -> None:
        super().__init__(
            lambda address: grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS), self._close_soon
        )
        self._closing: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """End every stream."""
        self.close()
        await asyncio.gather(*self._closing)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        closing = asyncio.create_task(channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class TwoStreams:
    """A router's stream of events and, once it brought a ticket, a worker's beside it; read as one.

    `read` gives the router's end (not an event) only when the worker's stream has ended too, or is not needed.
    """

    def __init__(self, router: Any, channels: DirectChannels) -> None:
        self._router = router
        self._channels = channels
        self._worker: Any = None
        self._address = ""
        self._router_read: asyncio.Task[Any] | None = None
        self._worker_read: asyncio.Task[Any] | None = None
        self._router_end: object | None = None

    def redeem(self, ticket: wire.Ticket, next_index: list[int], timeout_s: float | None) -> None:
        """Streams from the worker that the ticket names, in place of one before."""
        self.forget_worker()
        self._worker, self._address = self._channels.open(ticket, next_index, timeout_s), ticket.address

    def __del__(self) -> None:
        # What waits for events keeps a call alive, which would else end with the answer that is dropped.
        if self._router_read is not None or self._worker is not None:
            self.cancel()

    async def read(self) -> object:
        """The next event of either; what the router's stream raises."""
        while True:
            if self._worker is None and self._router_read is None:
                return self._router_end if self._router_end is not None else await self._router.read()
            pending = [each for each in (self._next_of_router(), self._next_of_worker()) if each is not None]
            if not pending:
                return self._router_end
            patience_s = LATE_S if self._router_end is not None else None
            done, _ = await asyncio.wait(pending, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            event = self._arrived()
            if event is not None:
                return event
            if not done:
                self.forget_worker()

    def cancel(self) -> None:
        """Hangs up on both."""
        self.forget_worker()
        self._router.cancel()
        if self._router_read is not None:
            self._router_read.add_done_callback(_retrieve)

    def _arrived(self) -> object | None:
        """What came, the worker's first: its stream ends without a word."""
        if self._worker_read is not None and self._worker_read.done():
            read, self._worker_read = self._worker_read, None
            event = self._outcome(read)
            if event is not None:
                return event
            self._worker = None
        if self._router_read is not None and self._router_read.done():
            read, self._router_read = self._router_read, None
            event = read.result()
            if isinstance(event, wire.GenerateResponse):
                return event
            self._router_end = event
        return None

    def _outcome(self, read: "asyncio.Task[Any]") -> wire.GenerateResponse | None:
        """What a worker sent; None for the end of its stream, however that came."""
        error = None if read.cancelled() else read.exception()
        self._channels.failed(self._address, error)
        if read.cancelled() or error is not None:
            return None
        event = read.result()
        return event if isinstance(event, wire.GenerateResponse) else None

    def _next_of_router(self) -> asyncio.Task[Any] | None:
        if self._router_read is None and self._router_end is None:
            self._router_read = asyncio.ensure_future(self._router.read())
        return self._router_read

    def _next_of_worker(self) -> asyncio.Task[Any] | None:
        if self._worker_read is None and self._worker is not None:
            self._worker_read = asyncio.ensure_future(self._worker.read())
        return self._worker_read

    def forget_worker(self) -> None:
        """Hangs up on the worker alone, if there is one."""
        if self._worker is not None:
            self._worker.cancel()
            self._worker = None
        if self._worker_read is not None:
            self._worker_read.add_done_callback(_retrieve)
            self._worker_read = None


def _retrieve(read: "asyncio.Task[Any]") -> None:
    """An outcome that nobody waits for any more is no error."""
    if not read.cancelled():
        read.exception()
