"""The receiving end of one stream of frames, whichever way it runs: what opens it, and one answer for each frame.

What a stream may have sent and not seen acknowledged is its credit; summed over streams that is at most the credit
book's budget. Landing slots come on top; they are as many as their carrier says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvtransfer.frames import DamagedFrame, Opening
from kvtransfer.transports.carriers import CarrierFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from kvtransfer.credit import CreditBook
    from kvtransfer.frames import Ack, SlotRef
    from kvtransfer.landing import FrameLander
    from kvtransfer.transports.carriers import LandingSlots


class LandingStream:
    """One stream that a credit book has let in under the name `stream`. For one thread."""

    def __init__(
        self, lander: FrameLander, credits: CreditBook, stream: int, slots: Sequence[LandingSlots] = ()
    ) -> None:
        self._lander = lander
        self._credits = credits
        self._stream = stream
        self._slots = slots

    def opening(self) -> Opening:
        """The first message down."""
        return Opening(self._credits.credit(self._stream), tuple(slots.offer() for slots in self._slots))

    def take(self, message: Buffer) -> Ack:
        """Lands one frame; its acknowledgement with the credit that holds from now on."""
        ack = self._lander.land(message, self._read_slot if self._slots else None)
        return replace(ack, credit=self._credits.credit(self._stream))

    def close(self, *, clean: bool) -> None:
        """Gives credit and slots back. `clean`: the sender has said that it sends no more."""
        self._credits.close(self._stream)
        for slots in self._slots:
            slots.close(clean=clean)

    def _read_slot(self, ref: SlotRef) -> memoryview:
        if ref.offer >= len(self._slots):
            raise DamagedFrame(f"a slot of offer {ref.offer}, but {len(self._slots)} were made")
        slots = self._slots[ref.offer]
        if ref.slot >= slots.num_slots or ref.num_bytes > slots.slot_bytes:
            text = (
                f"{ref.num_bytes} bytes in slot {ref.slot}: there are {slots.num_slots} of {slots.slot_bytes}"
            )
            raise DamagedFrame(text)
        try:
            return slots.read(ref.slot, ref.num_bytes)
        except CarrierFailed as error:
            raise DamagedFrame(f"slot {ref.slot} cannot be read: {error}") from error
