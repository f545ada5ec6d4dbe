"""Streams from workers beside the router's, for the blocking client. `_direct` has the asyncio client's.

As long as there is no ticket, events are read in the caller's thread. With one, a thread each reads the router's stream
and the worker's into one bounded queue.
"""

import queue
import threading
from contextlib import suppress
from typing import Any

import grpc

from headrace._connection import CHANNEL_OPTIONS
from headrace._direct import LATE_S, DirectChannels
from headrace.v1 import inference_pb2 as wire

MAX_EVENTS = 64
"""Read ahead, of both streams; what they hold beyond that waits in gRPC's windows."""
_POLL_S = 1.0


def blocking_channels() -> DirectChannels:
    """Those of a blocking client."""
    return DirectChannels(
        lambda address: grpc.insecure_channel(address, options=CHANNEL_OPTIONS),
        lambda channel: channel.close(),
    )


class BlockingStreams:
    """As `_direct.TwoStreams`: an iterator over a router's events, and a worker's once there was a ticket. Its end is
    the router's, when the worker's stream has ended too or is not needed. `cancel` may be called from any thread."""

    def __init__(self, router: Any, channels: DirectChannels) -> None:
        self._router = router
        self._channels = channels
        self._worker: Any = None
        self._address = ""
        self._events: queue.Queue[tuple[Any, wire.GenerateResponse | None, BaseException | None]] | None = (
            None
        )
        self._is_closed = threading.Event()
        self._is_router_over = False

    def __del__(self) -> None:
        if self._events is not None:
            self.cancel()  # the threads would keep the calls alive

    def __iter__(self) -> "BlockingStreams":
        return self

    def __next__(self) -> wire.GenerateResponse:
        if self._events is None:
            event: wire.GenerateResponse = next(self._router)
            return event
        while self._worker is not None or not self._is_router_over:
            try:
                call, arrived, error = self._events.get(timeout=LATE_S if self._is_router_over else None)
            except queue.Empty:
                self.forget_worker()
                continue
            if arrived is not None and (call is self._router or call is self._worker):
                return arrived
            if call is self._router:
                self._is_router_over = True
                if error is not None:
                    raise error
            elif call is self._worker:
                self._channels.failed(self._address, error)
                self._worker = None
        raise StopIteration

    def redeem(self, ticket: wire.Ticket, next_index: list[int], timeout_s: float | None) -> None:
        """Streams from the worker that the ticket names, in place of one before."""
        self.forget_worker()
        self._worker, self._address = self._channels.open(ticket, next_index, timeout_s), ticket.address
        if self._worker is None:
            return
        if self._events is None:
            self._events = queue.Queue(MAX_EVENTS)
            self._read(self._router)
        self._read(self._worker)

    def cancel(self) -> bool:
        """Hangs up on both."""
        self._is_closed.set()
        self.forget_worker()
        return bool(self._router.cancel())

    def forget_worker(self) -> None:
        """Hangs up on the worker alone, if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()

    def _read(self, call: Any) -> None:
        arguments = (call, self._events, self._is_closed)
        threading.Thread(target=_read_into, args=arguments, name="headrace stream", daemon=True).start()


def _read_into(call: Any, events: "queue.Queue[Any]", is_closed: threading.Event) -> None:
    """Without a reference to the streams, so that dropping these ends it."""
    error: BaseException | None = None
    try:
        for event in call:
            if not _put(events, (call, event, None), is_closed):
                return
    except grpc.RpcError as failed:
        error = failed
    _put(events, (call, None, error), is_closed)


def _put(events: "queue.Queue[Any]", item: Any, is_closed: threading.Event) -> bool:
    while True:
        with suppress(queue.Full):
            events.put(item, timeout=_POLL_S)
            return True
        if is_closed.is_set():
            return False
