"""The sender's books for one lease: which piece is which frame, what is in flight, what must go again.

Pure: it decides what to send next within a window of bytes; others read the cache and send. Payloads
are not kept: a frame that must go again is read from the cache again, so memory does not grow with
the window or with losses.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtransfer.frames import AckFault, FrameRecord
from kvtransfer.lease_types import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtransfer.frames import Ack
    from kvtransfer.layouts import CacheLayout, Piece

SEND_AGAIN = frozenset({AckFault.DAMAGED_FRAME.value, Refusal.FRAME_LANDING.value})


class FrameRefused(Exception):
    """A frame that cannot land, however often it is sent. `cause` is UPPER_SNAKE."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message


@dataclass(slots=True)
class _Entry:
    piece: Piece
    raw_bytes: int
    record: FrameRecord | None = None
    taken_at: float = 0.0
    num_resends: int = 0


@dataclass(frozen=True, slots=True)
class LedgerTotals:
    """Bytes and times so far. See `PushStats` for what each means."""

    num_frames: int
    num_resent: int
    kv_bytes: int
    wire_bytes: int
    transfer_s: float
    frame_s: float


class FrameLedger:
    """`window_bytes` bounds what is in flight (raw bytes, not acknowledged); a single frame may be larger.

    `max_resends` bounds how often one frame goes again because the receiver asked for it.
    """

    def __init__(
        self, layout: CacheLayout, window_bytes: int, max_resends: int, clock: Callable[[], float]
    ) -> None:
        self._layout = layout
        self._window_bytes = window_bytes
        self._max_resends = max_resends
        self._clock = clock
        self._entries: list[_Entry] = []
        self._to_send: deque[int] = deque()
        self._in_flight: deque[int] = deque()
        self._in_flight_bytes = 0
        self._num_resent = 0
        self._wire_bytes = 0
        self._frame_s = 0.0
        self._first_taken_at: float | None = None
        self._last_ack_at = 0.0

    def add(self, pieces: Iterable[Piece]) -> None:
        """Numbers new pieces and queues them."""
        for piece in pieces:
            self._to_send.append(len(self._entries))
            self._entries.append(_Entry(piece, piece.num_bytes(self._layout)))

    def take(self) -> int | None:
        """The next frame to send, now counted as in flight; None when there is none or no room."""
        if not self._to_send:
            return None
        entry = self._entries[self._to_send[0]]
        if self._in_flight and self._in_flight_bytes + entry.raw_bytes > self._window_bytes:
            return None
        entry.taken_at = self._clock()
        if self._first_taken_at is None:
            self._first_taken_at = entry.taken_at
        number = self._to_send.popleft()
        self._in_flight.append(number)
        self._in_flight_bytes += entry.raw_bytes
        return number

    def piece(self, number: int) -> Piece:
        return self._entries[number].piece

    def raw_bytes(self, number: int) -> int:
        return self._entries[number].raw_bytes

    def note_sent(self, number: int, checksum: int, wire_bytes: int) -> None:
        """What the frame became; a frame sent again must become the same bytes."""
        entry = self._entries[number]
        self._num_resent += entry.record is not None
        entry.record = FrameRecord(entry.raw_bytes, checksum)
        self._wire_bytes += wire_bytes

    def acknowledge(self, ack: Ack) -> None:
        """Takes the word on the oldest frame in flight. Raises FrameRefused when it can never land."""
        if not self._in_flight or ack.number not in (None, self._in_flight[0]):
            expected = self._in_flight[0] if self._in_flight else "none"
            raise FrameRefused("PROTOCOL_ERROR", f"acknowledged frame {ack.number}, expected {expected}")
        number = self._in_flight.popleft()
        entry = self._entries[number]
        self._in_flight_bytes -= entry.raw_bytes
        now = self._clock()
        self._frame_s += now - max(entry.taken_at, self._last_ack_at)
        self._last_ack_at = now
        if ack.ok:
            return
        if ack.cause not in SEND_AGAIN:
            raise FrameRefused(ack.cause, f"frame {number}: {ack.message}")
        self._send_again(number, ack.cause)

    def lose_in_flight(self) -> None:
        """The stream broke: what was not acknowledged goes again, in order, ahead of the rest."""
        self._to_send.extendleft(reversed(self._in_flight))
        self._in_flight.clear()
        self._in_flight_bytes = 0

    def send_missing(self, numbers: Iterable[int]) -> None:
        """The receiver lacks these. Raises FrameRefused for a number never sent or asked for too often."""
        for number in numbers:
            if number >= len(self._entries):
                raise FrameRefused("PROTOCOL_ERROR", f"the receiver asks for frame {number}, never sent")
            self._send_again(number, "MISSING_FRAME")

    def manifest(self) -> dict[int, FrameRecord]:
        """Every frame and what it became; complete once settled."""
        records = ((number, entry.record) for number, entry in enumerate(self._entries))
        return {number: record for number, record in records if record is not None}

    @property
    def has_work(self) -> bool:
        return bool(self._to_send)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight_bytes

    @property
    def is_settled(self) -> bool:
        """Every frame so far has been acknowledged as landed."""
        return not self._to_send and not self._in_flight

    def totals(self) -> LedgerTotals:
        sent = [entry for entry in self._entries if entry.record is not None]
        first = self._first_taken_at
        return LedgerTotals(
            num_frames=len(sent),
            num_resent=self._num_resent,
            kv_bytes=sum(entry.raw_bytes for entry in sent),
            wire_bytes=self._wire_bytes,
            transfer_s=max(0.0, self._last_ack_at - first) if first is not None else 0.0,
            frame_s=self._frame_s,
        )

    def _send_again(self, number: int, cause: str) -> None:
        entry = self._entries[number]
        entry.num_resends += 1
        if entry.num_resends > self._max_resends:
            raise FrameRefused(cause, f"frame {number} was refused {entry.num_resends} times")
        self._to_send.appendleft(number)
