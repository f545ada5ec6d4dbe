"""The sender's end of carrier `tcp` (see `tcp`): staging memory, and the connections that it is sent on."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from kvtransfer.transports.carriers import (
    DEFAULT_CARRIER_BYTES,
    DEFAULT_NUM_SLOTS,
    DEFAULT_SLOT_BYTES,
    CarrierFailed,
    check_slot,
)
from kvtransfer.transports.slot_memory import SlotMemory
from kvtransfer.transports.tcp import HEAD, PATIENCE_S, TOKEN_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

CONNECT_S = 1.0
"""Workers of one cluster are that near, or no carrier's place to be."""
UNREACHABLE_S = 60.0
"""So long an address that could not be connected to is not tried again."""
IDLE_S = 60.0
"""A connection that no stream has used for so long is closed."""

_log = logging.getLogger(__name__)
_Address = tuple[str, int]


class TcpLinks:
    """A process's connections, one for each receiver, and its staging memory. Safe to call from several threads."""

    def __init__(self) -> None:
        self.staging = SlotMemory(DEFAULT_NUM_SLOTS * DEFAULT_SLOT_BYTES, DEFAULT_CARRIER_BYTES)
        self._lock = threading.Lock()
        self._links: dict[_Address, _Link] = {}
        self._unreachable: dict[_Address, float] = {}

    def open_writer(self, offer: Mapping[str, Any], host: str) -> TcpWriter:
        """`host`: where the receiver is. Raises CarrierFailed."""
        return TcpWriter(self, _Offer.parse(offer), host)

    def link(self, address: _Address) -> _Link:
        """A connection that works as far as is known, with one more user. Raises CarrierFailed."""
        with self._lock:
            link = self._links.get(address)
            if link is not None and link.join():
                return link
            if time.monotonic() < self._unreachable.get(address, 0.0):
                raise CarrierFailed(f"{address[0]} port {address[1]} could not be reached a moment ago")
        try:
            connection = socket.create_connection(address, CONNECT_S)
        except OSError as error:
            with self._lock:
                self._forget_old()
                self._unreachable[address] = time.monotonic() + UNREACHABLE_S
            raise CarrierFailed(f"{address[0]} port {address[1]} cannot be reached: {error}") from error
        fresh = _Link(connection)
        with self._lock:
            link = self._links.get(address)
            if link is not None and link.join():  # another stream was faster
                fresh.close()
                return link
            self._links = {key: link for key, link in self._links.items() if not link.is_over}
            self._links[address] = fresh
        return fresh

    def close(self) -> None:
        """Ends all connections."""
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close()

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._unreachable = {key: until for key, until in self._unreachable.items() if until > now}


class _Link:
    """One connection and the thread that sends on it. Made with one user."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(PATIENCE_S)  # of one write: so long the receiver may take nothing
        self._connection = connection
        self._lock = threading.Lock()
        self._num_users = 1
        self._payloads: queue.SimpleQueue[_Payload | None] = queue.SimpleQueue()
        self.is_over = False
        threading.Thread(target=self._run, name="kv-tcp-send", daemon=True).start()

    def join(self) -> bool:
        """One more user; False where the connection has ended."""
        with self._lock:
            self._num_users += not self.is_over
            return not self.is_over

    def leave(self) -> None:
        """One user less."""
        with self._lock:
            self._num_users -= 1

    def send(self, payload: _Payload) -> bool:
        """Its writer is told when it is on its way or never will be; False where the connection has ended."""
        with self._lock:
            if not self.is_over:
                self._payloads.put(payload)
            return not self.is_over

    def close(self) -> None:
        """What was not sent yet is not."""
        self._payloads.put(None)

    def _run(self) -> None:
        payload: _Payload | None = None
        try:
            while True:
                try:
                    payload = self._payloads.get(timeout=IDLE_S)
                except queue.Empty:
                    if self._ends_idle():
                        return
                    continue
                if payload is None:
                    return
                if not payload.writer.is_closed:  # else its stream is over
                    self._write(payload)
                payload.writer.note_sent()
        except OSError as error:
            _log.info("a connection for KV payloads has broken: %s", error)
            if payload is not None:
                payload.writer.note_sent()
        finally:
            with self._lock:
                self.is_over = True
            self._connection.close()
            while not self._payloads.empty():
                rest = self._payloads.get()
                if rest is not None:
                    rest.writer.note_sent()

    def _ends_idle(self) -> bool:
        with self._lock:
            self.is_over = self._num_users == 0 and self._payloads.empty()
            return self.is_over

    def _write(self, payload: _Payload) -> None:
        rest = [memoryview(payload.head), payload.content]
        while rest:
            sent = self._connection.sendmsg(rest)
            while rest and sent >= len(rest[0]):
                sent -= len(rest.pop(0))
            if rest:
                rest[0] = rest[0][sent:]


class TcpWriter:
    """`SlotWriter` over one link. `flush` returns at once: the link's thread sends while the next frame is made. Its
    slots are as many and as large as both the offer and the staging memory have. Raises CarrierFailed."""

    def __init__(self, links: TcpLinks, offer: _Offer, host: str) -> None:
        self.num_slots = min(offer.num_slots, DEFAULT_NUM_SLOTS)
        self.slot_bytes = min(offer.slot_bytes, DEFAULT_SLOT_BYTES)
        self._token = offer.token
        self._links = links
        self._lock = threading.Lock()
        self._num_unsent = 0
        self.is_closed = False
        self._memory = links.staging.take()
        try:
            self._link = links.link((host, offer.port))
        except CarrierFailed:
            links.staging.put_back(self._memory)
            raise

    def buffer(self, slot: int) -> torch.Tensor:
        start = self._start(slot, self.slot_bytes)
        return torch.from_numpy(self._memory[start : start + self.slot_bytes])

    def flush(self, slot: int, num_bytes: int, deadline: float) -> None:
        """The fence is the receiver's: it reads the slot when all of it is there."""
        start = self._start(slot, num_bytes)
        content = self._memory[start : start + num_bytes].data
        with self._lock:
            self._num_unsent += 1
        if not self._link.send(_Payload(self, HEAD.pack(self._token, slot, num_bytes), content)):
            self.note_sent()
            raise CarrierFailed("the connection has ended")

    def close(self) -> None:
        with self._lock:
            was_closed, self.is_closed = self.is_closed, True
            if not was_closed:
                self._link.leave()
                if not self._num_unsent:
                    self._links.staging.put_back(self._memory)

    def note_sent(self) -> None:
        """A payload is not read here any more."""
        with self._lock:
            self._num_unsent -= 1
            if self.is_closed and not self._num_unsent:
                self._links.staging.put_back(self._memory)

    def _start(self, slot: int, num_bytes: int) -> int:
        check_slot(self, slot, num_bytes)
        return slot * DEFAULT_SLOT_BYTES


@dataclass(frozen=True, slots=True)
class _Payload:
    writer: TcpWriter
    head: bytes
    content: memoryview


@dataclass(frozen=True, slots=True)
class _Offer:
    port: int
    token: bytes
    num_slots: int
    slot_bytes: int

    @staticmethod
    def parse(offer: Mapping[str, Any]) -> _Offer:
        """Raises CarrierFailed for what no receiver offers."""
        token = offer.get("token")
        numbers = [offer.get(key) for key in ("port", "slots", "bytes")]
        if (
            not isinstance(token, bytes)
            or len(token) != TOKEN_BYTES
            or not all(type(number) is int and 0 < number < 1 << 32 for number in numbers)
            or cast("int", numbers[0]) >= 1 << 16
        ):
            raise CarrierFailed("the offer of TCP slots is malformed")
        port, num_slots, slot_bytes = cast("list[int]", numbers)
        return _Offer(port, token, num_slots, slot_bytes)
