"""One frame of a push, from the decision to send it to its message: in a landing slot where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.built_frames import build_frame
from kvtransfer.transports.carriers import CarrierFailed

if TYPE_CHECKING:
    from kvtransfer.built_frames import BuiltFrame
    from kvtransfer.frame_builder import PieceEncoder
    from kvtransfer.frames import LeaseRef
    from kvtransfer.layouts import Piece
    from kvtransfer.ledger import FrameCoding
    from kvtransfer.transports.slot_writing import StreamSlots

IN_PLACE_CODEC = "raw"
"""Its payload is the canonical bytes: they are gathered into the slot itself."""


@dataclass(frozen=True, slots=True)
class SlotTask:
    """The slot that was taken for a frame."""

    slots: StreamSlots
    slot: int


@dataclass(frozen=True, slots=True)
class FrameTask:
    """A frame to be made now. `place`: where its payload shall lie, unless in the message."""

    number: int
    piece: Piece
    coding: FrameCoding
    place: SlotTask | None


def make_frame(
    encoder: PieceEncoder, lease: LeaseRef, task: FrameTask, flush_by: float
) -> tuple[BuiltFrame, CarrierFailed | None]:
    """The frame, and why it is not in its slot where the carrier failed. `flush_by`: on time.monotonic()."""
    codec, fidelity, place = task.coding.codec, task.coding.fidelity, task.place
    if place is None:
        return build_frame(lease, task.number, encoder.encode(task.piece, codec, fidelity)), None
    try:
        buffer = place.slots.buffer(place.slot)
    except CarrierFailed as error:
        return build_frame(lease, task.number, encoder.encode(task.piece, codec, fidelity)), error
    is_in_place = codec.name == IN_PLACE_CODEC
    encoded = encoder.encode(task.piece, codec, fidelity, buffer if is_in_place else None)
    payload = memoryview(encoded.payload)
    if payload.nbytes > len(buffer):  # a codec may add a little to what it cannot shrink
        return build_frame(lease, task.number, encoded), None
    try:
        if not is_in_place:
            buffer.numpy()[: payload.nbytes] = np.frombuffer(payload, np.uint8)
        slot = place.slots.flush(place.slot, payload.nbytes, flush_by)
    except CarrierFailed as error:
        return build_frame(lease, task.number, encoded), error
    return build_frame(lease, task.number, encoded, slot), None
