"""What one push knows: what is ready, what is in flight, which codec a frame takes, where its payload goes.

Decides and remembers; its caller holds a lock, waits, reads the cache and talks to gRPC.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kvtransfer.frames import AckFault
from kvtransfer.layouts import DEFAULT_PIECE_BYTES, window_pieces_for
from kvtransfer.ledger import FrameCoding, FrameLedger
from kvtransfer.progress import PushProgress
from kvtransfer.transports.push_frames import FrameTask, SlotTask
from kvtransfer.transports.seam import PushStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.built_frames import BuiltFrame
    from kvtransfer.choice import CodecChooser
    from kvtransfer.frames import Ack
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.transports.slot_writing import StreamSlots


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    frame_bytes: int = DEFAULT_PIECE_BYTES
    window_bytes: int = 16 << 20  # of messages sent and not acknowledged; the receiver's credit may be less
    max_resends: int = 8  # of one frame
    align_tokens: int | None = None  # no frame crosses a multiple: for a receiver that keeps block by block
    reconnect_s: float = 1.0  # how long a broken stream is tried again
    abort_s: float = 1.0  # how long telling the receiver of an abort may take


class PushBooks:
    """The state of one push of `wire`, the layout in the dtypes that travel, from `start_token` on."""

    def __init__(
        self,
        wire: CacheLayout,
        start_token: int,
        chooser: CodecChooser,
        options: PushOptions,
        clock: Callable[[], float],
        *,
        waits_for_offers: bool = False,
    ) -> None:
        """`waits_for_offers`: no frame is made on a stream before the receiver has said where it may lie."""
        self.ledger = FrameLedger(wire, options.window_bytes, options.max_resends, clock)
        self.stream = 0  # rises when a stream is over; what is made for an older one does not count
        self._wire = wire
        self._start_token = start_token
        self._chooser = chooser
        self._frame_bytes = options.frame_bytes
        self._progress = PushProgress(wire, start_token, options.frame_bytes, options.align_tokens)
        self._is_sealed = False
        self._fidelity = 0
        self._waits_for_offers = waits_for_offers
        self._is_open = not waits_for_offers
        self._slots: StreamSlots | None = None
        self._inline: set[int] = set()  # frames that were damaged in a slot
        self._carried: Counter[str] = Counter()  # bytes, by PushStats.carriers' names

    # ---- what there is to send

    def advance(self, num_tokens: int, num_layers: int | None) -> bool:
        """Whether that is news."""
        return not self._is_sealed and self._progress.advance(num_tokens, num_layers)

    def declare_fidelity(self, rank: int) -> None:
        """The worst rank of what the cache holds of the sequence."""
        self._fidelity = max(self._fidelity, rank)

    def seal(self, num_tokens: int) -> None:
        """Nothing follows the first `num_tokens` positions. Raises ValueError when more were ready."""
        if num_tokens < self._progress.num_ready:
            text = f"{self._progress.num_ready} positions were advanced, the handoff has {num_tokens}"
            raise ValueError(text)
        if not self._is_sealed:
            self._progress.advance(num_tokens)
            self.refill()
            self.ledger.add(window_pieces_for(self._wire, num_tokens, self._frame_bytes))
            self._is_sealed = True

    def refill(self) -> None:
        """Numbers what became ready."""
        self.ledger.add(self._progress.take())

    @property
    def is_over(self) -> bool:
        """No frame will follow."""
        return self._is_sealed and self.ledger.is_settled

    @property
    def ends_in_order(self) -> bool:
        """No frame will follow, and nothing that a carrier has begun to write can still arrive."""
        return self.is_over and not (self._slots is not None and self._slots.has_failed)

    # ---- frame by frame

    def take(self) -> FrameTask | None:
        """The next frame to make and send, in flight from now on; None while there is none, or no room for it."""
        slots = self._slots
        if not self._is_open or (slots is not None and not slots.has_room and self.ledger.num_in_flight):
            return None
        number = self.ledger.take()
        if number is None:
            return None
        place: SlotTask | None = None
        if slots is not None and number not in self._inline:
            slot = slots.take(number, self.ledger.raw_bytes(number))
            place = None if slot is None else SlotTask(slots, slot)
        return FrameTask(number, self.ledger.piece(number), self._coding(number), place)

    def note_built(self, stream: int, task: FrameTask, frame: BuiltFrame, encode_s: float) -> None:
        """What a frame became, made for that stream."""
        if stream != self.stream:
            return  # it goes again in another stream, and counts there
        self.ledger.note_built(frame.number, frame.record.checksum, frame.payload_bytes, frame.wire_bytes)
        is_in_slot = task.place is not None and frame.wire_bytes > len(frame.message)
        carrier = task.place.slots.kind if task.place is not None and is_in_slot else "inline"
        self._carried[carrier] += frame.record.raw_bytes
        self._chooser.note_encoded(
            task.coding.codec.name, frame.record.raw_bytes, frame.payload_bytes, encode_s
        )

    def acknowledge(self, ack: Ack) -> None:
        """Takes one. Raises FrameRefused when the transfer cannot go on."""
        number = self.ledger.oldest_in_flight
        landed = self.ledger.acknowledge(ack)
        was_in_slot = self._slots is not None and number is not None and self._slots.give_back(number)
        if was_in_slot and number is not None and ack.cause == AckFault.DAMAGED_FRAME:
            self._inline.add(number)
        if landed is not None:
            codec, raw_bytes, payload_bytes = landed.codec, landed.raw_bytes, landed.payload_bytes
            self._chooser.note_landed(codec, raw_bytes, payload_bytes, landed.in_flight_s, ack.landing_s)

    # ---- stream by stream

    def open(self, stream: int, credit: int, slots: StreamSlots | None) -> None:
        """The receiver has opened the stream; payloads go into `slots` from now on, if there are any."""
        if stream == self.stream:
            self.ledger.credit = credit
            self._is_open = True
            self._slots = slots
        elif slots is not None:
            slots.close()

    def leave_stream(self) -> int:
        """The stream is over: what was in flight goes again. Returns how many frames that are."""
        self.stream += 1
        self._is_open = not self._waits_for_offers
        num_lost = self.ledger.num_in_flight
        self.ledger.lose_in_flight()
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        return num_lost

    def stats(self) -> PushStats:
        num_tokens = self._progress.num_cut - self._start_token
        return PushStats(num_tokens=num_tokens, carriers=dict(self._carried), **asdict(self.ledger.totals()))

    def _coding(self, number: int) -> FrameCoding:
        coding = self.ledger.coding(number)
        if coding is None:
            choice = self._chooser.choose(self.ledger.bytes_left + self.ledger.raw_bytes(number))
            coding = FrameCoding(choice.codec, choice.reason, self._fidelity)
            self.ledger.note_coding(number, coding)
        return coding
