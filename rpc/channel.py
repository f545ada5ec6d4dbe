"""Calls to one address over one connection; takes what generated stubs ask a channel for.

Only what Headrace's long-lived streams need: stream-stream calls. The connection is made with the first call and not
made again: whoever loses it opens another channel.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

import grpc

from rpc import heads
from rpc.connection import Limits
from rpc.frames import ErrorCode
from rpc.heads import BadHead, Status
from rpc.inbox import Inbox
from rpc.messages import BadMessage
from rpc.peer import Peer
from rpc.stream import Stream

MAX_QUEUED_BYTES: Final = 16 << 20  # of messages that were not read; then the peer's window closes

_CANCELLED: Final = Status(grpc.StatusCode.CANCELLED, "the call was cancelled here")

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class Channel:
    """Lives on one event loop; an async context manager that closes at its end."""

    def __init__(self, address: str, *, max_message_bytes: int, keepalive_s: float) -> None:
        """`address`: host:port. `keepalive_s`: a peer that is silent so long is asked, and given up after as long."""
        self._address = address
        self._limits = Limits(max_message_bytes=max_message_bytes)
        self._keepalive_s = keepalive_s
        self._connecting: asyncio.Task[_ClientPeer] | None = None

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every call, and the connection."""
        connecting, self._connecting = self._connecting, None
        if connecting is None:
            return
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        if not connecting.cancelled() and connecting.exception() is None:
            connecting.result().close()

    def stream_stream(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        _registered_method: bool = False,
    ) -> Callable[..., StreamCall[Any, Any]]:
        """As generated stubs ask for it."""

        def begin(metadata: Sequence[tuple[str, str | bytes]] = ()) -> StreamCall[Any, Any]:
            block = heads.request(self._address, path, metadata)
            return StreamCall(self._connected, block, request_serializer, response_deserializer)

        return begin

    def unary_unary(self, *_: Any, **__: Any) -> None:
        """Stubs ask for every method of their service; this kind cannot be called."""

    unary_stream = stream_unary = unary_unary

    async def _connected(self) -> _ClientPeer:
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        return await asyncio.shield(self._connecting)

    async def _connect(self) -> _ClientPeer:
        host, _, port = self._address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, peer = await loop.create_connection(
            lambda: _ClientPeer(self._limits, self._keepalive_s), host.strip("[]"), int(port)
        )
        return peer


class StreamCall(Generic[RequestT, ResponseT]):
    """A call with many messages both ways: `write` and `read` as grpc.aio's, each by one task at a time. Once the first
    of them is through, one may `send` while `is_writable`, told by `on_writable`, and have what comes `hand_on`ed."""

    def __init__(
        self,
        connect: Callable[[], Any],
        block: bytes,
        serialize: Callable[[RequestT], bytes],
        deserialize: Callable[[bytes], ResponseT],
    ) -> None:
        self._connect = connect
        self._block = block
        self._serialize = serialize
        self._deserialize = deserialize
        self._peer: _ClientPeer | None = None
        self._stream: Stream | None = None
        self.on_writable: Callable[[], None] = _nothing
        self._take: Callable[[ResponseT], None] | None = None
        self._is_done_writing = False
        self._responses = Inbox(MAX_QUEUED_BYTES)
        self._status: Status | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def write(self, message: RequestT) -> None:
        """Sends a message, and waits until there is room for another.

        Raises:
            grpc.aio.AioRpcError: the call is over.
        """
        await self._begin()
        self.send(message)
        while self._status is None and not self.is_writable:
            self._room.clear()
            await self._room.wait()
        if self._status is not None:
            raise _error(self._status)

    async def read(self) -> ResponseT | object:
        """The next message; `grpc.aio.EOF` where the peer ended the call in order.

        Raises:
            grpc.aio.AioRpcError: it was ended otherwise.
        """
        await self._begin()
        while not self._responses:
            if self._status is not None:
                if self._status.code is grpc.StatusCode.OK:
                    return grpc.aio.EOF
                raise _error(self._status)
            self._news.clear()
            await self._news.wait()
        assert self._peer is not None and self._stream is not None
        return self._deserialize(self._responses.take(self._peer.connection, self._stream))

    @property
    def is_writable(self) -> bool:
        """Whether what is sent now goes out at once, as far as is known."""
        peer, stream = self._peer, self._stream
        if peer is None or stream is None or self._status is not None:
            return False
        return not (stream.pending or peer.is_choked)

    def send(self, message: RequestT) -> None:
        """Sends a message without waiting; on a call that is over it does nothing."""
        if self._status is None and self._peer is not None and self._stream is not None:
            self._peer.connection.send_message(self._stream, self._serialize(message))

    async def hand_on(self, take: Callable[[ResponseT], None]) -> None:
        """Gives `take` every message as soon as it is here, until the peer ends the call in order. What `take` raises
        ends the call.

        Raises:
            grpc.aio.AioRpcError: it was ended otherwise.
        """
        while self._responses:
            message = await self.read()
            take(message)  # type: ignore[arg-type]
        self._take = take
        while self._status is None:
            self._news.clear()
            await self._news.wait()
        if self._status.code is not grpc.StatusCode.OK:
            raise _error(self._status)

    def done_writing(self) -> None:
        """Says that no message follows. Repeats change nothing."""
        if self._is_done_writing or self._status is not None:
            return
        if self._peer is not None and self._stream is not None:
            self._is_done_writing = True
            self._peer.connection.half_close(self._stream)

    def cancel(self, status: Status = _CANCELLED) -> bool:
        """Ends the call; False where it was over."""
        if self._status is not None:
            return False
        if self._peer is not None and self._stream is not None:
            self._peer.connection.cancel(self._stream, ErrorCode.CANCEL)
        self.over(status)
        return True

    async def details(self) -> str:
        """What the peer said at the end; empty before."""
        return self._status.details if self._status is not None else ""

    async def _begin(self) -> None:
        if self._stream is not None or self._status is not None:
            return
        try:
            peer: _ClientPeer = await self._connect()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            self.over(Status(grpc.StatusCode.UNAVAILABLE, f"failed to connect: {reason}"))
            return
        if self._stream is None and self._status is None:
            self._peer = peer
            self._stream = peer.begin(self._block, self)

    # --- what the connection says ------------------------------------------------------------------------

    def take_responses(self, messages: list[bytes]) -> None:
        assert self._peer is not None and self._stream is not None
        if self._take is None:
            self._responses.add(messages, self._peer.connection, self._stream)
            self._news.set()
            return
        try:
            for message in messages:
                self._take(self._deserialize(message))
        except Exception as error:  # noqa: BLE001 - the boundary: one call's defect is not its connection's
            self.cancel(
                Status(grpc.StatusCode.INTERNAL, f"a message could not be taken: {type(error).__name__}")
            )

    def writable(self) -> None:
        self._room.set()
        self.on_writable()

    def over(self, status: Status) -> None:
        if self._status is None:
            self._status = status
        self._news.set()
        self._room.set()


class _ClientPeer(Peer["Status | None"]):
    """The connection of a channel."""

    def __init__(self, limits: Limits, keepalive_s: float) -> None:
        super().__init__(True, heads.parse_status, limits, keepalive_s)
        self._reason = ""

    def begin(self, block: bytes, call: StreamCall[Any, Any]) -> Stream:
        stream = self.connection.begin(block)
        stream.owner = call
        if self.is_closed:
            call.over(Status(grpc.StatusCode.UNAVAILABLE, self._reason))
        return stream

    def head(self, stream: Stream, head: Status | BadHead | None) -> None:
        if isinstance(head, BadHead):
            stream.owner.over(Status(grpc.StatusCode.INTERNAL, str(head)))
        elif head is not None:
            stream.owner.over(head)

    def messages(self, stream: Stream, messages: list[bytes]) -> None:
        stream.owner.take_responses(messages)

    def bad_message(self, stream: Stream, error: BadMessage) -> None:
        self.connection.cancel(stream, ErrorCode.CANCEL)
        stream.owner.over(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)))

    def remote_done(self, stream: Stream) -> None:
        stream.owner.over(Status(grpc.StatusCode.INTERNAL, "the call ended without a status"))

    def reset(self, stream: Stream, code: int) -> None:
        name = ErrorCode(code).name if code in list(ErrorCode) else str(code)
        is_refused = code in (ErrorCode.REFUSED_STREAM, ErrorCode.NO_ERROR)
        found = grpc.StatusCode.UNAVAILABLE if is_refused else grpc.StatusCode.INTERNAL
        stream.owner.over(Status(found, f"the peer reset the call: {name}"))

    def writable(self, stream: Stream) -> None:
        stream.owner.writable()

    def going_away(self, last_stream_id: int, reason: str) -> None:
        self._reason = reason or "the peer is going away"
        for stream in tuple(self.connection.streams.values()):
            if stream.id > last_stream_id:
                stream.owner.over(Status(grpc.StatusCode.UNAVAILABLE, self._reason))

    def closed(self, reason: str) -> None:
        self._reason = self._reason or reason
        for stream in tuple(self.connection.streams.values()):
            stream.owner.over(Status(grpc.StatusCode.UNAVAILABLE, self._reason))


def _error(status: Status) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        status.code, grpc.aio.Metadata(), grpc.aio.Metadata(*status.metadata), status.details
    )


def _nothing() -> None:
    return None
