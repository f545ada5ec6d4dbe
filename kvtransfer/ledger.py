"""The sender's books for one lease: which piece is which frame, what is in flight, what must go again.

Pure: it decides what to send next within a window of bytes; others read the cache and send. Payloads
are not kept: a frame that must go again is read from the cache again, so memory does not grow with
the window or with losses. It becomes the same bytes, because its codec and fidelity are remembered.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvtransfer.frames import AckFault, FrameRecord
from kvtransfer.lease_types import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtransfer.codecs import Codec
    from kvtransfer.frames import Ack
    from kvtransfer.layouts import CacheLayout, Piece

SEND_AGAIN = frozenset({AckFault.DAMAGED_FRAME.value, Refusal.FRAME_LANDING.value})


class FrameRefused(Exception):
    """A frame that cannot land, however often it is sent. `cause` is UPPER_SNAKE."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(f"{cause}: {message}")
        self.cause = cause
        self.message = message


@dataclass(frozen=True, slots=True)
class FrameCoding:
    """What a frame is made with, the first time and every time: the codec, why it was taken, and the fidelity rank
    of the content before the codec."""

    codec: Codec
    reason: str
    fidelity: int


@dataclass(frozen=True, slots=True)
class LandedFrame:
    """A frame that has landed, as `CodecChooser.note_landed` wants to know of it."""

    codec: str
    raw_bytes: int
    payload_bytes: int
    in_flight_s: float


@dataclass(slots=True)
class _Entry:
    piece: Piece
    raw_bytes: int
    coding: FrameCoding | None = None
    record: FrameRecord | None = None
    payload_bytes: int = 0
    charged_bytes: int = 0  # of the window, while in flight
    taken_at: float = 0.0
    handed_at: float = 0.0
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
    codecs: dict[str, int]
    reason: str


class FrameLedger:
    """Frames of `layout` (with the dtypes that travel). Of what is in flight, not acknowledged, `window_bytes` is
    the sender's own bound and `credit` the receiver's (0 until it has told one); a frame counts with its raw bytes
    until it is built, then with those of its message. A single frame may be larger than either.

    `max_resends` bounds how often one frame goes again because the receiver asked for it.
    """

    def __init__(
        self, layout: CacheLayout, window_bytes: int, max_resends: int, clock: Callable[[], float]
    ) -> None:
        self.credit = 0
        self._layout = layout
        self._window_bytes = window_bytes
        self._max_resends = max_resends
        self._clock = clock
        self._entries: list[_Entry] = []
        self._to_send: deque[int] = deque()
        self._to_send_bytes = 0
        self._in_flight: deque[int] = deque()
        self._in_flight_bytes = 0
        self._num_resent = 0
        self._wire_bytes = 0
        self._frame_s = 0.0
        self._first_taken_at: float | None = None
        self._last_ack_at = 0.0
        self._codec_bytes: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}

    def add(self, pieces: Iterable[Piece]) -> None:
        """Numbers new pieces and queues them."""
        for piece in pieces:
            self._to_send.append(len(self._entries))
            self._entries.append(_Entry(piece, piece.num_bytes(self._layout)))
            self._to_send_bytes += self._entries[-1].raw_bytes

    def take(self) -> int | None:
        """The next frame to send, now counted as in flight; None when there is none or no room."""
        if not self._to_send:
            return None
        entry = self._entries[self._to_send[0]]
        window_bytes = min(self._window_bytes, self.credit)
        if self._in_flight and self._in_flight_bytes + entry.raw_bytes > window_bytes:
            return None
        entry.taken_at = entry.handed_at = self._clock()
        if self._first_taken_at is None:
            self._first_taken_at = entry.taken_at
        number = self._to_send.popleft()
        self._to_send_bytes -= entry.raw_bytes
        self._in_flight.append(number)
        self._charge(entry, entry.raw_bytes)
        return number

    def piece(self, number: int) -> Piece:
        return self._entries[number].piece

    def raw_bytes(self, number: int) -> int:
        return self._entries[number].raw_bytes

    def coding(self, number: int) -> FrameCoding | None:
        """What the frame is made with; None for one that was never taken."""
        return self._entries[number].coding

    def note_coding(self, number: int, coding: FrameCoding) -> None:
        """What the frame is made with from now on."""
        entry = self._entries[number]
        entry.coding = coding
        self._codec_bytes[coding.codec.name] += entry.raw_bytes
        self._reasons[coding.codec.name] = coding.reason

    def note_built(self, number: int, checksum: int, payload_bytes: int, wire_bytes: int) -> None:
        """What the frame became; `wire_bytes`: all that travels for it, wherever its payload lies."""
        entry = self._entries[number]
        self._num_resent += entry.record is not None
        entry.record = FrameRecord(entry.raw_bytes, checksum)
        entry.payload_bytes = payload_bytes
        self._wire_bytes += wire_bytes
        if entry.charged_bytes:  # else the stream broke in the meantime
            self._charge(entry, wire_bytes)

    def note_handed(self, number: int) -> None:
        """The transport takes the frame now."""
        self._entries[number].handed_at = self._clock()

    def acknowledge(self, ack: Ack) -> LandedFrame | None:
        """Takes the word on the oldest frame in flight; None when it goes again. Raises FrameRefused when it can
        never land."""
        if not self._in_flight or ack.number not in (None, self._in_flight[0]):
            expected = self._in_flight[0] if self._in_flight else "none"
            raise FrameRefused("PROTOCOL_ERROR", f"acknowledged frame {ack.number}, expected {expected}")
        self.credit = ack.credit
        number = self._in_flight.popleft()
        entry = self._entries[number]
        if entry.coding is None or entry.record is None:
            raise FrameRefused("PROTOCOL_ERROR", f"acknowledged frame {number}, which was not sent yet")
        self._charge(entry, 0)
        now = self._clock()
        in_flight_s = now - max(entry.handed_at, self._last_ack_at)
        self._frame_s += now - max(entry.taken_at, self._last_ack_at)
        self._last_ack_at = now
        if ack.ok:
            return LandedFrame(entry.coding.codec.name, entry.raw_bytes, entry.payload_bytes, in_flight_s)
        if ack.cause not in SEND_AGAIN:
            raise FrameRefused(ack.cause, f"frame {number}: {ack.message}")
        self._send_again(number, ack.cause)
        return None

    def lose_in_flight(self) -> None:
        """The stream broke: what was not acknowledged goes again, in order, ahead of the rest; the next stream
        begins without credit."""
        self.credit = 0
        for number in reversed(self._in_flight):
            self._charge(self._entries[number], 0)
            self._queue_first(number)
        self._in_flight.clear()

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
    def bytes_left(self) -> int:
        """Raw bytes that are known and not yet taken."""
        return self._to_send_bytes

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def oldest_in_flight(self) -> int | None:
        """The frame that the next acknowledgement is about."""
        return self._in_flight[0] if self._in_flight else None

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
        most_used = max(self._codec_bytes, key=self._codec_bytes.__getitem__, default="")
        return LedgerTotals(
            num_frames=len(sent),
            num_resent=self._num_resent,
            kv_bytes=sum(entry.raw_bytes for entry in sent),
            wire_bytes=self._wire_bytes,
            transfer_s=max(0.0, self._last_ack_at - first) if first is not None else 0.0,
            frame_s=self._frame_s,
            codecs=dict(self._codec_bytes),
            reason=self._reasons.get(most_used, ""),
        )

    def _charge(self, entry: _Entry, num_bytes: int) -> None:
        self._in_flight_bytes += num_bytes - entry.charged_bytes
        entry.charged_bytes = num_bytes

    def _queue_first(self, number: int) -> None:
        self._to_send.appendleft(number)
        self._to_send_bytes += self._entries[number].raw_bytes

    def _send_again(self, number: int, cause: str) -> None:
        entry = self._entries[number]
        entry.num_resends += 1
        if entry.num_resends > self._max_resends:
            raise FrameRefused(cause, f"frame {number} was refused {entry.num_resends} times")
        self._queue_first(number)
