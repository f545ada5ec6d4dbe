"""A connection on a socket: writes what gathered once in each turn of the loop, and looks whether the peer is alive."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Final, TypeVar, cast

from rpc.connection import Connection, Limits, Observer
from rpc.frames import ConnectionFault
from rpc.heads import Header

MAX_UNREAD_REPLIES: Final = 10_000  # to PINGs and SETTINGS: windows bound everything else
WRITE_AHEAD_BYTES: Final = 256 << 10

logger = logging.getLogger(__name__)

HeadT = TypeVar("HeadT")


class Peer(asyncio.Protocol, Observer[HeadT]):
    """One socket. Subclasses say what becomes of heads, messages and ends.

    A peer from which nothing came for `keepalive_s` is asked with a PING, and given up after as long again.
    """

    def __init__(
        self, is_client: bool, parse: Callable[[Iterable[Header]], HeadT], limits: Limits, keepalive_s: float
    ) -> None:
        self.connection: Connection[HeadT] = Connection(is_client, self, parse, limits)
        self.is_closed = False
        self.address = ""
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.gone: asyncio.Future[None] = self._loop.create_future()
        """Done once every stream and the socket are."""
        self._is_paused = False
        self._keepalive_s = keepalive_s
        self._is_quiet = False
        self._keepalive: asyncio.TimerHandle | None = None

    # --- what subclasses say, beside an observer's part ----------------------------------------------------

    @abstractmethod
    def closed(self, reason: str) -> None:
        """The socket is gone, and with it every stream. The last word."""

    # --- writing -----------------------------------------------------------------------------------------

    @property
    def is_choked(self) -> bool:
        """Whether so much waits to be written that no more should be added."""
        return self._is_paused or self.connection.gathered_bytes > WRITE_AHEAD_BYTES

    def output(self) -> None:
        self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Writes what is left to write, and closes."""
        if self._transport is not None and not self.is_closed:
            self._flush()
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Closes at once."""
        self._close(reason)
        if self._transport is not None:
            self._transport.abort()

    def pong(self) -> None:
        """An answer to our PING; that something came is all that it says."""

    def _flush(self) -> None:
        was_full = self.connection.gathered_bytes > WRITE_AHEAD_BYTES
        data = self.connection.take()
        if not data or self._transport is None or self.is_closed:
            return
        self._transport.write(data)
        if not self._is_paused:
            self.connection.num_replies = 0
            if was_full:
                self._writable_again()
        elif self.connection.num_replies > MAX_UNREAD_REPLIES:
            self.abort("the peer does not read what it is sent")

    # --- asyncio's side ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(high=WRITE_AHEAD_BYTES)
        name = transport.get_extra_info("peername")
        self.address = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else str(name or "")
        self.connection.open()
        self._keepalive = self._loop.call_later(self._keepalive_s, self._look)

    def data_received(self, data: bytes) -> None:
        self._is_quiet = False
        try:
            self.connection.receive(data)
        except ConnectionFault as fault:
            logger.info("connection with %s given up: %s", self.address, fault)
            self.connection.go_away(fault.code, str(fault))
            self.close()
            self._close(str(fault))

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._writable_again()

    def _writable_again(self) -> None:
        for stream in tuple(self.connection.streams.values()):
            if not stream.pending:
                self.writable(stream)

    def connection_lost(self, exc: Exception | None) -> None:
        self._close(f"the connection was lost: {exc}" if exc else "the peer closed the connection")

    def _close(self, reason: str) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if self._keepalive is not None:
            self._keepalive.cancel()
        self.closed(reason)
        self.gone.set_result(None)

    def _look(self) -> None:
        if self._is_quiet:
            self.abort(f"the peer was silent for {2 * self._keepalive_s:g} s and did not answer a PING")
            return
        self._is_quiet = True
        self.connection.num_resets = 0
        self.connection.ping()
        self._keepalive = self._loop.call_later(self._keepalive_s, self._look)
