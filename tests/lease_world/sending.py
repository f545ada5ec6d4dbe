"""One lease's frames on their way out: what a push and the answer to a fetch have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvtransfer.contact import Contact
from kvtransfer.frames import Ack, FrameRecord, LeaseRef
from kvtransfer.layouts import Piece
from kvtransfer.ledger import FrameCoding, FrameLedger, FrameRefused
from tests.lease_world.content import LAYOUT, checksum_of, payload_of
from tests.lease_world.network import FrameMessage, Stream, ghost

if TYPE_CHECKING:
    from tests.lease_world.worker import Event, Worker

CREDIT_BYTES = 64
WINDOW_BYTES = 60
MAX_RESENDS = 4


class Plain:
    """Stands for a codec: the ledger wants its name."""

    name = "raw"


CODING = FrameCoding(Plain(), "", 0)  # type: ignore[arg-type]


class Upload:
    """Sends pieces of one owner's cache into one lease elsewhere, over one stream after the other.

    A frame is taken in one event and read in another, so that anything may come between: that is why its
    blocks are held. `error`: set once there is no use in going on.
    """

    def __init__(
        self, worker: Worker, ref: LeaseRef, to: str, owner: bytes, prompt: tuple[int, ...], ttl_s: float
    ) -> None:
        self.worker = worker
        self.ref = ref
        self.to = to
        self.error: str | None = None
        self.contact = Contact(ttl_s, worker.clock)
        self.ledger = FrameLedger(LAYOUT, WINDOW_BYTES, MAX_RESENDS, worker.clock)
        self._owner = owner
        self._prompt = prompt
        self._stream: Stream | None = None
        self._building: tuple[int, Stream] | None = None
        self._has_room = True  # until the window is full

    @property
    def is_reading(self) -> bool:
        return self._building is not None

    def events(self) -> Iterator[Event]:
        if self._building is not None:
            yield "a frame is built", self._build
        elif self.error is None and self._has_room and self.ledger.has_work:
            yield "a frame is taken", self._take
        if self.error is None and self.contact.is_lost:
            yield "the receiver is given up", lambda: self.fail("RECEIVER_STALLED")

    def fail(self, cause: str) -> None:
        self.error = self.error or cause

    def hang_up(self) -> None:
        if self._stream is not None:
            self.worker.net.break_stream(self._stream, ghosts=self.worker.world.coin())

    def add(self, pieces: Iterable[Piece]) -> None:
        self.ledger.add(pieces)

    def _take(self) -> None:
        if self._stream is None:
            if not self.worker.world.can_dial(self.to):
                self.fail("PEER_UNAVAILABLE")
                return
            self._stream = self.worker.net.open(
                Stream(self.worker.name, self.to, self._acknowledged, self._stream_broken)
            )
            self.ledger.credit = CREDIT_BYTES
        number = self.ledger.take()
        if number is not None:
            self.contact.touch()
            self._building = number, self._stream
        else:
            assert self.ledger.num_in_flight, "frames wait, and nothing is in flight that would make room"
            self._has_room = False

    def _build(self) -> None:
        assert self._building is not None
        (number, stream), self._building = self._building, None
        piece = self.ledger.piece(number)
        payload = self.worker.memory.read(self._owner, piece)
        assert payload == payload_of(self._prompt, piece), "the sender reads what is not the prompt's"
        checksum = checksum_of(payload, number)
        self.ledger.note_coding(number, CODING)
        self.ledger.note_built(number, checksum, len(payload), len(payload))
        record = FrameRecord(self.ledger.raw_bytes(number), checksum)
        frame = FrameMessage(self.ref, number, record, piece, payload)
        if stream.broken:
            self.worker.net.loose.append(ghost(stream.source, stream.to, frame))
        else:
            stream.frames.append(frame)

    def _acknowledged(self, ack: Ack) -> None:
        self.contact.touch()
        self._has_room = True
        if self.error is not None:
            return
        try:
            self.ledger.acknowledge(ack)
        except FrameRefused as refused:
            self.fail(refused.cause)

    def _stream_broken(self) -> None:
        self._stream = None
        self._has_room = True
        self.ledger.lose_in_flight()
