"""How one frame lands: verify, ask the lease table, hand it to whatever keeps it. The same for every transport
and for every keeper: a worker's cache, a host tier.

A frame that cannot land becomes a refusal that says why, never an exception: the stream goes on. Knows no torch.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kvtransfer.frames import Ack, AckFault, DamagedFrame, decode_frame
from kvtransfer.layouts import Paged
from kvtransfer.lease_types import AlreadyLanded, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from kvtransfer.desk import LeaseDesk
    from kvtransfer.frames import Frame, FrameHeader, SlotRef
    from kvtransfer.layouts import CacheLayout
    from kvtransfer.lease_types import Landing, Refusal

_log = logging.getLogger(__name__)


class CannotLand(Exception):
    """A frame that is refused: the fault and, in words, why."""

    def __init__(self, fault: AckFault | Refusal, message: str) -> None:
        super().__init__(message)
        self.fault = fault


class FrameSink(Protocol):
    """Takes frames that a lease admits. Called by several threads at once, without any lock."""

    def check(self, header: FrameHeader) -> int:
        """The fidelity rank that the frame's content will have here: the worst of what the header says, the codec's
        class and any conversion. Nothing is allocated or written yet. Raises CannotLand."""

    def write(self, landing: Landing, frame: Frame) -> None:
        """Writes a frame that `check` let pass; the payload may be reused as soon as this returns. Raises
        CannotLand; any other exception refuses the frame as LANDING_FAILED."""

    def fence(self) -> None:
        """Returns when everything written so far is visible to whoever reads it after the commit."""


LayoutOf: TypeAlias = "Callable[[bytes], CacheLayout]"
"""A lease's layout, by its id, where leases of several layouts meet. Raises CannotLand for a lease it does not know."""


def layout_of(layout: CacheLayout | LayoutOf) -> LayoutOf:
    """The same layout for every lease where one is given."""
    return layout if callable(layout) else lambda lease_id: layout


class FrameLander:
    """Lands frames in a sink under the leases of a desk; safe to call from several threads.

    `layout`: of the planes, to tell the prefix that a lease holds; one for all leases, or each lease's own.
    `pace(num_bytes)`: called before a frame is written, without the lock; it may sleep, so that landing does not
    stall a decode step.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        sink: FrameSink,
        layout: CacheLayout | LayoutOf,
        clock: Callable[[], float],
        pace: Callable[[int], None] | None = None,
    ) -> None:
        self._desk = desk
        self._sink = sink
        self._layout_of = layout_of(layout)
        self._clock = clock
        self._pace = pace

    def land(self, message: Buffer, read_slot: Callable[[SlotRef], memoryview] | None = None) -> Ack:
        """Takes one message of the bulk stream and gives its acknowledgement, without credit.

        `read_slot`: as `decode_frame` takes it, for streams that have landing slots.
        """
        received_at = self._clock()

        def read_when_here(slot: SlotRef) -> memoryview:
            nonlocal received_at
            assert read_slot is not None
            payload = read_slot(slot)
            received_at = self._clock()  # its payload may have been under way
            return payload

        try:
            frame = decode_frame(message, read_when_here if read_slot is not None else None)
        except DamagedFrame as error:
            return Ack(None, ok=False, cause=AckFault.DAMAGED_FRAME, message=str(error))
        number = frame.header.number
        if self._pace is not None:
            self._pace(len(frame.payload))
        try:
            self._check_piece(frame.header)
            refused = self._admit_and_write(frame, self._sink.check(frame.header))
        except CannotLand as error:
            return Ack(number, ok=False, cause=error.fault, message=str(error))
        if refused is not None:
            return Ack(number, ok=False, cause=refused.refusal, message=refused.message)
        return Ack(number, ok=True, landing_s=self._clock() - received_at)

    def _check_piece(self, header: FrameHeader) -> None:
        """The piece lies in the layout, and has the length that is declared, before anything of it is allocated."""
        layout = self._layout_of(header.lease.lease_id)
        try:
            layout.check(header.piece)
            wire = layout.plane(header.piece.plane).with_dtypes(header.dtypes)
        except ValueError as error:
            raise CannotLand(AckFault.BAD_PIECE, str(error)) from None
        num_bytes = wire.num_bytes(header.piece)
        if header.raw_bytes != num_bytes:
            text = f"raw length {header.raw_bytes}, but the piece has {num_bytes} bytes here"
            raise CannotLand(AckFault.BAD_PIECE, text)

    def _admit_and_write(self, frame: Frame, fidelity: int) -> Refused | None:
        header = frame.header
        with self._desk.change() as table:
            answer = table.begin_landing(header.lease, header.number, frame.record)
        if isinstance(answer, Refused):
            return answer
        if isinstance(answer, AlreadyLanded):
            return None
        landed = False
        try:
            self._check_lease(answer, header, fidelity)
            self._write(answer, frame)
            landed = True
        finally:
            with self._desk.change() as table:
                table.end_landing(answer, frame.record, header.piece, landed=landed, fidelity=fidelity)
        return None

    def _check_lease(self, landing: Landing, header: FrameHeader, fidelity: int) -> None:
        """What the lease allows, for every sink alike."""
        if fidelity > landing.fidelity:
            text = f"content of fidelity rank {fidelity}, the lease allows {landing.fidelity}"
            raise CannotLand(AckFault.FIDELITY_EXCEEDED, text)
        layout, entries = self._layout_of(landing.lease_id), header.piece.entries
        kind = layout.plane(header.piece.plane).kind
        if isinstance(kind, Paged):
            first = landing.start_token // kind.tokens_per_entry
            if entries.start < first:
                text = f"entries from {entries.start}, but those below {first} are shared prefix here"
                raise CannotLand(AckFault.BAD_PIECE, text)

    def _write(self, landing: Landing, frame: Frame) -> None:
        try:
            self._sink.write(landing, frame)
        except CannotLand:
            raise
        except Exception as error:  # codecs and stores may fail in any way: one frame pays for it
            _log.warning("frame %d of lease %s failed to land", frame.header.number, landing.lease_id.hex())
            raise CannotLand(AckFault.LANDING_FAILED, f"{type(error).__name__}: {error}") from error
