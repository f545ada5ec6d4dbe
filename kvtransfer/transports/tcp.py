"""Carrier `tcp`: payloads travel on a plain connection beside gRPC's, received into the slots where they lie.

Between any two processes that reach each other; what gRPC for Python does with a message costs more than all the rest
of a transfer (docs/benchmarks.md). A connection serves all streams from one sender to one receiver. On it, for every
payload:

    token      16 bytes: that of the offer whose slot is written
    slot       u32, little endian
    num_bytes  u32, little endian
    ...        the payload

The frame that names the slot comes on the gRPC stream and may come first: reading a slot waits for its payload. Whoever
begins a connection with no valid token is not listened to. A payload for a stream that is over is read and thrown away,
so that late writes reach nothing: memory serves the next stream whatever way the last one ended.

Memory: at most `max_bytes` of slots at a receiver, as much for staging at a sender.
"""

from __future__ import annotations

import logging
import secrets
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from kvtransfer.transports.carriers import CarrierFailed, check_slot
from kvtransfer.transports.slot_memory import SlotMemory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HEAD = struct.Struct("<16sII")
TOKEN_BYTES = 16
PATIENCE_S = 10.0
"""So long nothing may move on a connection while somebody waits for it."""

_MAX_CONNECTIONS = 256
_READ_BYTES = 1 << 20  # so often a payload's progress is noted
_log = logging.getLogger(__name__)


class TcpLanding:
    """The receiver's end of all connections, on a port of `host` that the system chooses. Raises CarrierFailed where it
    cannot listen there. Safe to call from several threads."""

    def __init__(self, host: str, *, num_slots: int, slot_bytes: int, max_bytes: int) -> None:
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.memory = SlotMemory(num_slots * slot_bytes, max_bytes)
        self._lock = threading.Lock()
        self._open: dict[bytes, TcpSlots] = {}
        self._connections: set[socket.socket] = set()
        self._is_closed = False
        self._moved_at = time.monotonic()
        try:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, 0), family=family, backlog=_MAX_CONNECTIONS)
        except OSError as error:
            raise CarrierFailed(f"cannot listen on {host}: {error}") from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="kv-tcp-accept", daemon=True).start()

    def open(self) -> TcpSlots:
        """Slots for one stream. Raises CarrierFailed when the budget is used up."""
        slots = TcpSlots(self, self.memory.take(), secrets.token_bytes(TOKEN_BYTES))
        with self._lock:
            self._open[slots.token] = slots
        return slots

    def forget(self, slots: TcpSlots) -> None:
        """Payloads for these slots are thrown away from now on."""
        with self._lock:
            self._open.pop(slots.token, None)

    def patience_left_s(self, since: float) -> float:
        """How long a payload may still be waited for that has been waited for `since`: as long as anything moves."""
        return max(since, self._moved_at) + PATIENCE_S - time.monotonic()

    def close(self) -> None:
        """Ends all connections. Idempotent."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        _end(self._listener)
        for connection in connections:
            _end(connection)

    def _accept(self) -> None:
        with self._listener:
            while not self._is_closed:
                try:
                    connection, _ = self._listener.accept()
                except OSError:
                    if self._is_closed:
                        return
                    time.sleep(0.1)  # out of descriptors, say: others may be closed meanwhile
                    continue
                with self._lock:
                    is_wanted = not self._is_closed and len(self._connections) < _MAX_CONNECTIONS
                    if is_wanted:
                        self._connections.add(connection)
                if is_wanted:
                    threading.Thread(
                        target=self._serve, args=(connection,), name="kv-tcp", daemon=True
                    ).start()
                else:
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        is_known = False
        try:
            connection.settimeout(PATIENCE_S)
            while True:
                head = bytearray(HEAD.size)
                self._fill(connection, memoryview(head))
                token, slot, num_bytes = HEAD.unpack(head)
                slots = self._open.get(token)
                if not is_known:
                    if slots is None:
                        return
                    is_known = True
                    _be_patient(connection)
                self._land(connection, slots, slot, num_bytes)
        except OSError as error:
            _log.debug("a connection for KV payloads has ended: %s", error)
        finally:
            connection.close()
            with self._lock:
                self._connections.discard(connection)
                orphans = [slots for slots in self._open.values() if slots.connection is connection]
            for slots in orphans:
                slots.fail("its connection has ended")

    def _land(self, connection: socket.socket, slots: TcpSlots | None, slot: int, num_bytes: int) -> None:
        if slot >= self.num_slots or num_bytes > self.slot_bytes:
            raise OSError(
                f"{num_bytes} bytes for slot {slot} of {self.num_slots} with {self.slot_bytes} each"
            )
        room = slots.lend(connection, slot, num_bytes) if slots is not None else None
        if slots is None or room is None:
            self._fill(connection, memoryview(bytearray(num_bytes)))
            return
        is_whole = False
        try:
            self._fill(connection, room)
            is_whole = True
        finally:
            slots.give_back(slot, num_bytes if is_whole else None)

    def _fill(self, connection: socket.socket, room: memoryview) -> None:
        """Raises OSError where the connection ends before."""
        filled = 0
        while filled < len(room):
            num_bytes = connection.recv_into(room[filled : filled + _READ_BYTES], 0, socket.MSG_WAITALL)
            if not num_bytes:
                raise OSError("closed by the sender")
            filled += num_bytes
            self._moved_at = time.monotonic()


class TcpSlots:
    """`LandingSlots` in `memory`, which goes back to the landing once nobody writes into it."""

    def __init__(self, landing: TcpLanding, memory: NDArray[np.uint8], token: bytes) -> None:
        self.num_slots = landing.num_slots
        self.slot_bytes = landing.slot_bytes
        self.token = token
        self._landing = landing
        self._memory = memory
        self._changed = threading.Condition()
        self._arrived: dict[int, int] = {}  # bytes by slot, until read
        self._num_lent = 0
        self._is_closed = False
        self._failed = ""
        self.connection: socket.socket | None = None  # that the payloads come by

    # ---- the stream's thread

    def offer(self) -> dict[str, Any]:
        return {
            "kind": "tcp",
            "port": self._landing.port,
            "token": self.token,
            "slots": self.num_slots,
            "bytes": self.slot_bytes,
        }

    def read(self, slot: int, num_bytes: int) -> memoryview:
        """Waits for the payload, for PATIENCE_S without any progress at most."""
        check_slot(self, slot, num_bytes)
        since = time.monotonic()
        with self._changed:
            while slot not in self._arrived:
                left_s = self._landing.patience_left_s(since)
                if self._is_closed or self._failed or left_s <= 0:
                    raise CarrierFailed(
                        f"the payload did not come: {self._failed or 'closed, or nothing moves'}"
                    )
                self._changed.wait(left_s)
            arrived = self._arrived.pop(slot)
        if arrived != num_bytes:
            raise CarrierFailed(f"{arrived} bytes came for slot {slot}, the frame names {num_bytes}")
        return self._room(slot, num_bytes).toreadonly()

    def close(self, *, clean: bool) -> None:
        """No thread reads a slot any more; what still comes is thrown away, however the stream ended."""
        self._landing.forget(self)
        with self._changed:
            was_closed, self._is_closed = self._is_closed, True
            self._changed.notify_all()
            if not was_closed and not self._num_lent:
                self._landing.memory.put_back(self._memory)

    # ---- the connection's thread

    def lend(self, connection: socket.socket, slot: int, num_bytes: int) -> memoryview | None:
        """Where the payload goes, until `give_back`; None where the slots are closed."""
        with self._changed:
            self.connection = connection
            if self._is_closed:
                return None
            self._num_lent += 1
            self._arrived.pop(slot, None)
            return self._room(slot, num_bytes)

    def give_back(self, slot: int, num_bytes: int | None) -> None:
        """So many bytes lie in the slot; None: not all that were announced."""
        with self._changed:
            self._num_lent -= 1
            if num_bytes is not None:
                self._arrived[slot] = num_bytes
            self._changed.notify_all()
            if self._is_closed and not self._num_lent:
                self._landing.memory.put_back(self._memory)

    def fail(self, reason: str) -> None:
        """Nothing more comes."""
        with self._changed:
            self._failed = reason
            self._changed.notify_all()

    def _room(self, slot: int, num_bytes: int) -> memoryview:
        start = slot * self.slot_bytes
        return self._memory[start : start + num_bytes].data


def _be_patient(connection: socket.socket) -> None:
    """It belongs here and may be idle; only a peer that is gone without a word ends it."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _end(connection: socket.socket) -> None:
    """Wakes the thread that waits for it, which closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended already
        connection.close()
