"""Servicers behind listening sockets; takes what grpc.aio.server's generated code registers."""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
import traceback
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc

from rpc import heads
from rpc.call import ServerCall
from rpc.connection import Limits
from rpc.heads import BadHead, RequestHead, Status
from rpc.messages import BadMessage
from rpc.peer import Peer
from rpc.stream import Stream

logger = logging.getLogger(__name__)

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Guard: TypeAlias = Callable[[str, Handler], Handler]
"""Makes the handler of a method, given by its path, into the one that is called; asked once a method."""

CLOSE_S = 0.5  # how long a client has to read what was written to it
_BACKLOG = 1024
_DEFECT = Status(grpc.StatusCode.INTERNAL, "internal error")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """`max_calls`: under way at a time, on all connections together; more are refused with RESOURCE_EXHAUSTED."""

    max_message_bytes: int = 4 << 20
    max_calls: int = 10_000
    keepalive_s: float = 10.0


class Server:
    """Made, started and stopped on one event loop, on which all servicers run."""

    def __init__(self, settings: ServerSettings, guard: Guard | None = None) -> None:
        self._settings = settings
        self._guard = guard or (lambda _path, handler: handler)
        self._handlers: dict[str, Handler] = {}
        self._calls: set[ServerCall] = set()
        self._connections: set[_ServerPeer] = set()
        self._sockets: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._is_stopping = False
        self._idle: asyncio.Event | None = None

    # --- what generated code calls -----------------------------------------------------------------------

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Does nothing: the same methods come by `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        """The methods of a service by name."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self._handlers[path] = self._guard(path, handler)

    def add_insecure_port(self, address: str) -> int:
        """Binds host:port, or every address of a host's name; port 0 takes a free one. Returns the port.

        Raises:
            RuntimeError: it cannot be listened on.
        """
        host, _, port_text = address.rpartition(":")
        port = 0
        try:
            found = socket.getaddrinfo(
                host.strip("[]") or None, int(port_text), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, _, _, _, where in dict.fromkeys(found):
                self._sockets.append(_listening(family, (where[0], port or where[1])))
                port = self._sockets[-1].getsockname()[1]
        except (OSError, ValueError) as error:
            for bound in self._sockets:
                bound.close()
            raise RuntimeError(f"cannot listen on {address}: {error}") from None
        return port

    async def start(self) -> None:
        """Begins to accept."""
        loop = asyncio.get_running_loop()
        for bound in self._sockets:
            self._listeners.append(
                await loop.create_server(
                    lambda: _ServerPeer(self, self._settings), sock=bound, backlog=_BACKLOG
                )
            )

    async def stop(self, grace_s: float | None) -> None:
        """Refuses new calls, waits for those under way as long as the grace, and cuts the rest."""
        self._is_stopping = True
        for listener in self._listeners:
            listener.close()
        if not self._listeners:
            for bound in self._sockets:
                bound.close()
        for connection in self._connections:
            connection.connection.go_away(reason="the server is stopping")
        if self._calls and grace_s:
            self._idle = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), grace_s)
        tasks = [call.task for call in self._calls if call.task is not None]
        for call in tuple(self._calls):
            call.end(Status(grpc.StatusCode.UNAVAILABLE, "the server is stopping"))
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._close_connections()

    async def _close_connections(self) -> None:
        for connection in tuple(self._connections):
            connection.close()
        closed = [connection.gone for connection in self._connections]
        if closed:
            await asyncio.wait(closed, timeout=CLOSE_S)
        for connection in tuple(self._connections):
            connection.abort("the server has stopped")
        await asyncio.sleep(0)  # sockets are closed in the loop's next turn

    # --- what connections call ---------------------------------------------------------------------------

    def connected(self, connection: _ServerPeer) -> None:
        self._connections.add(connection)

    def disconnected(self, connection: _ServerPeer) -> None:
        self._connections.discard(connection)

    def begin(self, connection: _ServerPeer, stream: Stream, head: RequestHead | BadHead) -> None:
        """A request's headers came."""
        if isinstance(head, BadHead):
            connection.connection.send_headers(stream, heads.http_error(head.http_status), ends=True)
            return
        handler = self._handlers.get(head.path)
        if handler is None:
            _refuse(
                connection, stream, Status(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {head.path}")
            )
        elif self._is_stopping:
            _refuse(connection, stream, Status(grpc.StatusCode.UNAVAILABLE, "the server is stopping"))
        elif len(self._calls) >= self._settings.max_calls:
            text = f"{self._settings.max_calls} calls are under way, and no more are taken"
            _refuse(connection, stream, Status(grpc.StatusCode.RESOURCE_EXHAUSTED, text))
        else:
            call = ServerCall(connection, stream, head, handler, asyncio.get_running_loop())
            stream.owner = call
            self._calls.add(call)
            if handler.request_streaming:
                call.task = asyncio.create_task(_serve(call, call.requests()))

    def ended(self, call: ServerCall) -> None:
        self._calls.discard(call)
        if self._idle is not None and not self._calls:
            self._idle.set()


class _ServerPeer(Peer[RequestHead]):
    """One client's connection."""

    def __init__(self, server: Server, settings: ServerSettings) -> None:
        limits = Limits(max_message_bytes=settings.max_message_bytes, max_streams=settings.max_calls)
        super().__init__(False, heads.parse_request, limits, settings.keepalive_s)
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connected(self)

    def head(self, stream: Stream, head: RequestHead | BadHead) -> None:
        if stream.owner is None:
            self._server.begin(self, stream, head)

    def messages(self, stream: Stream, messages: list[bytes]) -> None:
        if stream.owner is not None:
            stream.owner.take_requests(messages)

    def bad_message(self, stream: Stream, error: BadMessage) -> None:
        if stream.owner is not None:
            stream.owner.take_bad(error)

    def remote_done(self, stream: Stream) -> None:
        call: ServerCall | _Refusal | None = stream.owner
        if call is None or call.is_over:
            return
        call.requests_done()
        if isinstance(call, ServerCall) and not call.handler.request_streaming:
            _answer(call)

    def reset(self, stream: Stream, code: int) -> None:
        if stream.owner is not None:
            stream.owner.gone()

    def writable(self, stream: Stream) -> None:
        if stream.owner is not None:
            stream.owner.writable()

    def going_away(self, last_stream_id: int, reason: str) -> None:
        """A client that begins no more calls; those under way go on."""

    def call_ended(self, call: ServerCall) -> None:
        self._server.ended(call)

    def closed(self, reason: str) -> None:
        for stream in tuple(self.connection.streams.values()):
            if stream.owner is not None:
                stream.owner.gone()
        self._server.disconnected(self)


def _answer(call: ServerCall) -> None:
    """Begins the servicer of a call with one request: at once where it pushes, else as a task."""
    behavior = _behavior(call.handler)
    try:
        request = call.the_request()
        if call.is_over:
            return
        if _is_async(behavior):
            call.task = asyncio.create_task(_serve(call, request))
        else:
            behavior(request, call)
    except grpc.aio.AbortError:
        return
    except Exception as error:  # noqa: BLE001 - as in `_serve`
        _failed(call, error)


async def _serve(call: ServerCall, request: Any) -> None:
    """Runs a servicer that is a coroutine or an async generator to its end."""
    behavior = _behavior(call.handler)
    try:
        result = behavior(request, call)
        if isinstance(result, AsyncGenerator):
            async with aclosing(result):
                async for message in result:
                    await call.write(message)
        else:
            message = await result
            if not call.handler.response_streaming and not call.is_over:
                call.send(message)
        call.end()
    except grpc.aio.AbortError:
        return
    except asyncio.CancelledError:
        call.end(Status(grpc.StatusCode.CANCELLED, "the call was cancelled"))
        raise
    except Exception as error:  # noqa: BLE001 - a defect must not reach the caller as it is
        _failed(call, error)


def _failed(call: ServerCall, error: Exception) -> None:
    if isinstance(error, NotImplementedError):
        call.end(Status(grpc.StatusCode.UNIMPLEMENTED, "the method is not implemented"))
        return
    # Where it happened, but not its text, which might quote what was asked.
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("a servicer failed: %s\n%s", type(error).__name__, frames)
    call.end(_DEFECT)


def _behavior(handler: Handler) -> Callable[[Any, ServerCall], Any]:
    kinds: tuple[Any, ...] = (
        handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream
    )  # fmt: skip
    found: Callable[[Any, ServerCall], Any] = next(kind for kind in kinds if kind is not None)
    return found


def _is_async(behavior: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(behavior) or inspect.isasyncgenfunction(behavior)


class _Refusal:
    """In place of a call that is not taken. Told once the caller has said something: some cannot bear to be answered
    while they are about to send."""

    def __init__(self, connection: _ServerPeer, stream: Stream, status: Status) -> None:
        self.is_over = False
        self._connection = connection
        self._stream = stream
        self._status = status

    def take_requests(self, _messages: list[bytes]) -> None:
        self.requests_done()

    def take_bad(self, _error: BadMessage) -> None:
        self.requests_done()

    def requests_done(self) -> None:
        if not self.is_over:
            self.is_over = True
            block = heads.RESPONSE + heads.trailers(self._status)
            self._connection.connection.send_headers(self._stream, block, ends=True)

    def gone(self) -> None:
        self.is_over = True

    def writable(self) -> None:
        """Nothing waits but the refusal."""


def _refuse(connection: _ServerPeer, stream: Stream, status: Status) -> None:
    stream.owner = _Refusal(connection, stream, status)


def _listening(family: int, where: Sequence[Any]) -> socket.socket:
    # Said outright, so that asyncio sees a TCP socket and lets small frames go out at once.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(tuple(where))
        bound.setblocking(False)
    except OSError:
        bound.close()
        raise
    return bound
