"""One call as its servicer sees it: what services use of grpc.aio.ServicerContext, and `send` and `end` for those that
push."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Final, NoReturn, Protocol

import grpc

from rpc import heads
from rpc.connection import Connection
from rpc.frames import ErrorCode
from rpc.heads import Metadata, RequestHead, Status
from rpc.inbox import Inbox
from rpc.messages import BadMessage
from rpc.stream import Stream

MAX_QUEUED_BYTES: Final = 1 << 20  # of messages that a servicer has not taken; then the peer's window closes
LATE_S: Final = 1.0
"""A caller gives its call up at the deadline by itself; a servicer that goes on for so long after it is ended."""

OK: Final = Status(grpc.StatusCode.OK)
_LATE: Final = Status(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")


class Socket(Protocol):
    """The connection that a call came on."""

    @property
    def is_choked(self) -> bool: ...

    @property
    def connection(self) -> Connection[Any]: ...

    def call_ended(self, call: ServerCall) -> None: ...


class ServerCall:
    """Lives on the server's loop. Services either take it as their `context`, in a coroutine or an async generator that
    is cancelled when the caller goes; or they are plain functions, which keep it, `send` while `is_writable`, `end`
    it, and are told through `on_writable` and `on_over`."""

    def __init__(
        self,
        socket: Socket,
        stream: Stream,
        head: RequestHead,
        handler: grpc.RpcMethodHandler[Any, Any],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.handler = handler
        self.is_over = False
        self.task: asyncio.Task[None] | None = None
        self.on_writable: Callable[[], None] = _nothing
        self.on_over: Callable[[], None] = _nothing
        self._socket = socket
        self._stream = stream
        self._connection = socket.connection
        self._metadata = head.metadata
        self._serialize = handler.response_serializer or _as_it_is
        self._loop = loop
        self._has_headers = False
        self._status: Status | None = None
        # The one request of other calls is bounded by its size.
        self._requests = Inbox(MAX_QUEUED_BYTES if handler.request_streaming else math.inf)
        self._has_all_requests = False
        self._news: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._deadline_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        if head.timeout_s is not None:
            self._deadline_s = loop.time() + head.timeout_s
            self._timer = loop.call_later(head.timeout_s + LATE_S, self.end, _LATE)

    # --- as grpc.aio.ServicerContext ---------------------------------------------------------------------

    def invocation_metadata(self) -> Metadata:
        """What the caller sent beside the request."""
        return self._metadata

    def time_remaining(self) -> float | None:
        """Until the caller's deadline, in seconds; None without one."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - self._loop.time())

    def set_code(self, code: grpc.StatusCode) -> None:
        """What generated code says of a method that nobody wrote; see `Server`."""

    def set_details(self, details: str) -> None:
        """As `set_code`."""

    async def write(self, message: Any) -> None:
        """Sends a message, and waits until there is room for another."""
        self.send(message)
        while not self.is_writable:
            if self.is_over:
                raise asyncio.CancelledError("the call is over")
            self._room = self._room or self._loop.create_future()
            await self._room

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()
    ) -> NoReturn:
        """Ends the call, and the servicer with it."""
        self.end(Status(code, details, tuple(trailing_metadata)))
        raise grpc.aio.AbortError("the servicer aborted the call")

    # --- for services that push --------------------------------------------------------------------------

    @property
    def is_writable(self) -> bool:
        """Whether what is sent now goes out at once, as far as is known."""
        return not (self._stream.pending or self._socket.is_choked or self.is_over)

    def send(self, message: Any) -> None:
        """Sends a message without waiting; on a call that is over it does nothing."""
        if not self.is_over:
            self.send_serialized(self._serialize(message))

    def send_serialized(self, data: bytes) -> None:
        """As `send`, for whoever has the message's bytes already."""
        if self.is_over:
            return
        if not self._has_headers:
            self._has_headers = True
            self._connection.send_headers(self._stream, heads.RESPONSE)
        self._connection.send_message(self._stream, data)

    def end(self, status: Status = OK) -> None:
        """Ends the call behind what was sent. Repeats change nothing."""
        if self.is_over:
            return
        self._status = status
        trailers = heads.trailers(status)
        self._connection.send_headers(
            self._stream, trailers if self._has_headers else heads.RESPONSE + trailers, ends=True
        )
        self._over()

    # --- what the connection says ------------------------------------------------------------------------

    def take_requests(self, messages: list[bytes]) -> None:
        self._requests.add(messages, self._connection, self._stream)
        self._wake_reader()

    def take_bad(self, error: BadMessage) -> None:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if error.is_too_large else grpc.StatusCode.UNIMPLEMENTED
        self.end(Status(code, str(error)))

    def requests_done(self) -> None:
        self._has_all_requests = True
        self._wake_reader()

    def writable(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None
        self.on_writable()

    def gone(self) -> None:
        """The caller, or the connection to it, is gone."""
        if not self.is_over:
            self._over()

    # --- requests ----------------------------------------------------------------------------------------

    def the_request(self) -> Any:
        """Of a call with one request, once it is whole. Ends the call and gives None where it is not one."""
        if len(self._requests) != 1:
            self.end(Status(grpc.StatusCode.UNIMPLEMENTED, "the call has one request message"))
            return None
        return self._parse(self._requests.take(self._connection, self._stream))

    async def requests(self) -> Any:
        """Of a call with many."""
        while True:
            while self._requests:
                yield self._parse(self._requests.take(self._connection, self._stream))
            if self._has_all_requests:
                return
            self._news = self._loop.create_future()
            await self._news

    def _parse(self, data: bytes) -> Any:
        parse = self.handler.request_deserializer or _as_it_is
        try:
            return parse(data)
        except Exception:  # noqa: BLE001 - whatever a message that cannot be parsed makes its parser raise
            self.end(Status(grpc.StatusCode.INTERNAL, "the request message cannot be parsed"))
            raise grpc.aio.AbortError("the request message cannot be parsed") from None

    def _wake_reader(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _over(self) -> None:
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._status is None:
            self._connection.cancel(self._stream, ErrorCode.CANCEL)
        if self.task is not None and self.task is not _current_task():
            self.task.cancel()
        self._socket.call_ended(self)
        self.on_over()
        self.on_writable = self.on_over = _nothing


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _as_it_is(data: Any) -> Any:
    return data


def _nothing() -> None:
    return None
